# The reference's loss with 55% of its tokens: the same 303M parameters and a norm on each query and
# key, Muon for the matrices, and a rate that falls in a line to zero.
#   python data/prepare.py && python train.py config/train_gpt_fast.py
# 8,250 updates, 4.06 B tokens. About 48 hours on one RTX 3090, as the plan computes them (it gives
# the reference 87 hours). Expected validation loss 2.89, extrapolated from models up to 3.9M
# parameters in the blocks, where 0.54 was measured (docs/recipes.md): nobody has run it. One with
# 31.5M hints at 0.6. Shorter: --max_iters=6000 --warmup_iters=320, 35 hours and 0.03 to 0.09 above
# the reference's loss, as small models have it.

out_dir = "out/gpt_fast"
dataset = "openwebtext"  # 9.04 B tokens, of which the run sees 4.06 B

# 12 windows x 1,024 tokens x 40 micro-steps
tokens_per_step = 491520
batch_size = 12
max_position_embeddings = 1024

num_hidden_layers = 24
hidden_size = 1024
intermediate_size = 2560
num_attention_heads = 16
num_key_value_heads = 4
head_dim = 64
qk_norm = True  # exports as Qwen3

optimizer = "muon"
max_iters = 8250
warmup_iters = 440
lr_schedule = "wsd"
decay_share = 0.5
learning_rate = 2.5e-3  # of the embedding and the norms; by one over the width in another model
muon_lr = 1.8e-3  # of the matrices; by one over the root of the width
min_lr = 0.0

eval_interval = 400
eval_windows = 2400
milestone_interval = 4000  # the rate falls from 4,125 on: the first can be prolonged
reference = "assets/curves/easygpt.jsonl"  # the original run; the log says how far this one is
