# A small GPT on the prose inside Python itself: words and docstrings on a laptop, by the recipe.
#   python data/prepare.py --source=stdlib && python train.py config/train_demo.py
# A few minutes on two CPU cores (two on an Intel Xeon: 119 s); validation loss 2.95 nats per token,
# 1.67 bits per byte, where a uniform guess has 3.92.

out_dir = "out/demo"
overwrite = True  # the demo may be run again and again
dataset = "stdlib"
dtype = "float32"  # what the figures above were measured in

# 8 windows x 128 tokens: many small updates learn more in minutes than few large ones
tokens_per_step = 1024
batch_size = 8
max_position_embeddings = 128

# 1.0M parameters
num_hidden_layers = 4
hidden_size = 128
intermediate_size = 384
num_attention_heads = 4
num_key_value_heads = 4
head_dim = 32
qk_norm = True

optimizer = "muon"
max_iters = 1600
warmup_iters = 80
lr_schedule = "wsd"
decay_share = 0.5
learning_rate = 1.2e-2
muon_lr = 4e-3
min_lr = 0.0

eval_interval = 400
eval_windows = 350
sample_prompt = "Return the"
log_interval = 100
