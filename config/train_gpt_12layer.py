# Half the depth of the reference with the recipe of train_gpt_fast.py, for a day: 177M parameters.
#   python data/prepare.py && python train.py config/train_gpt_12layer.py
# About 20 hours for 6,000 updates (2.95 B tokens) on one RTX 3090, as the plan computes them;
# expected loss unknown, nobody has run it.

out_dir = "out/gpt_12layer"
dataset = "openwebtext"

# 16 windows x 1,024 tokens x 30 micro-steps
tokens_per_step = 491520
batch_size = 16
max_position_embeddings = 1024

num_hidden_layers = 12
hidden_size = 1024
intermediate_size = 2560
num_attention_heads = 16
num_key_value_heads = 4
head_dim = 64
qk_norm = True

optimizer = "muon"
max_iters = 6000
warmup_iters = 320
lr_schedule = "wsd"
decay_share = 0.5
learning_rate = 2.5e-3
muon_lr = 1.8e-3
min_lr = 0.0

eval_interval = 200
eval_windows = 2400
