# Teach a trained model to answer, on conversations.
#   python data/prepare.py --source=hub:HuggingFaceTB/smol-smoltalk --chat=True --dataset=chat
#   python train.py config/finetune_chat.py --init_from=out/gpt/best.pt
#   python sample.py --out_dir=out/chat --chat=True
# The conversations have to be prepared with the model's tokenizer, as any text: GPT-2's by default.
# Expected time and loss on a GPU: unknown, nobody has run it. docs/chat.md says what to expect.

out_dir = "out/chat"
init_from = "out/gpt/best.pt"
dataset = "chat"

# 4 windows x 1,024 tokens x 32 micro-steps; about a third of the tokens count
tokens_per_step = 131072
batch_size = 4

# A third of the pretraining rate, short: what the model knows is to stay
max_iters = 2000
warmup_iters = 50
learning_rate = 1e-4
min_lr = 1e-5
weight_decay = 0.01

eval_interval = 100
eval_windows = 400
sample_prompt = "What is the capital of France?"
log_interval = 5
