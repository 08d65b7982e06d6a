# The reference run: 303M parameters on OpenWebText.
#   python data/prepare.py && python train.py config/train_gpt.py
# 90 hours and about 15 GB on one RTX 3090 (22.7k tokens/s with bf16 and torch.compile); validation
# loss 2.887 at the end, on the way 3.42 at 2,000 updates and 3.2 at 4,000.
# Less memory: a smaller --batch_size gives the same run, since tokens_per_step stays.

out_dir = "out/gpt"
dataset = "openwebtext"  # 9.04 B tokens, of which the run sees 7.37 B

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

max_iters = 15000
warmup_iters = 800
learning_rate = 3.2e-4
min_lr = 3.2e-5

eval_interval = 400
eval_windows = 2400
reference = "assets/curves/easygpt.jsonl"  # the original run; the log says how far this one is
