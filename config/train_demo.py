# A small GPT on the prose inside Python itself, byte by byte: words and docstrings on a laptop.
#   python data/prepare.py --source=stdlib && python train.py config/train_demo.py
# Four minutes on two CPU cores (238 s on an AMD EPYC); validation loss 1.39 nats per byte, where a
# uniform guess has 5.55.

out_dir = "out/demo"
overwrite = True  # the demo may be run again and again
dataset = "stdlib"
dtype = "float32"  # what the figures above were measured in

# 4 windows x 128 bytes: many small updates learn more in five minutes than few large ones
tokens_per_step = 512
batch_size = 4
max_position_embeddings = 128

# 0.9M parameters
num_hidden_layers = 4
hidden_size = 128
intermediate_size = 384
num_attention_heads = 4
num_key_value_heads = 4
head_dim = 32

max_iters = 4000
warmup_iters = 200
learning_rate = 3e-3
min_lr = 1.5e-4

eval_interval = 1000
eval_windows = 400
sample_prompt = "Return the"
log_interval = 100
