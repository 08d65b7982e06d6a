# A small assistant that knows what functions of Python do, on a laptop.
#   python data/prepare.py --source=stdlib --chat=True
#   python train.py config/finetune_chat_demo.py
#   python sample.py --out_dir=out/chat_demo --chat=True --temperature=0
# Where there is none yet, a model is pretrained first, by the demo's recipe with a longer context.
# Six minutes on two CPU cores (two on an Intel Xeon: 5:45); loss 0.14 nats per token that counts on
# questions that it has not seen in these words, where it begins at 4.33.

from run.before import trained

out_dir = "out/chat_demo"
overwrite = True  # the demo may be run again and again
init_from = trained(
    "out/chat_demo_base",
    "data/prepare.py --source=stdlib",
    "data/prepare.py --source=stdlib --chat=True",
    "train.py config/train_demo.py --out_dir=out/chat_demo_base --init_from=auto"
    " --max_position_embeddings=512 --batch_size=2 --max_iters=800 --warmup_iters=40",
)
dataset = "stdlib_chat"
dtype = "float32"

# 8 windows x 512 tokens, each of three or four conversations
tokens_per_step = 4096
batch_size = 8
max_position_embeddings = 512

# The demo's rates: high for fine-tuning, since the answers are to be known by heart
optimizer = "muon"
max_iters = 450
warmup_iters = 20
lr_schedule = "wsd"
decay_share = 0.5
learning_rate = 1.2e-2
muon_lr = 4e-3
min_lr = 0.0

eval_interval = 150
eval_windows = 31
sample_prompt = "What does os.path.join do?"
log_interval = 50
