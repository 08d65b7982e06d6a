# Go on from a trained model on your own text.
#   python data/prepare.py --source=my_text.txt --dataset=mine
#   python train.py config/finetune.py --init_from=out/gpt/best.pt --dataset=mine
# Expected time on a GPU: unknown, nobody has timed it. The loss starts at the model's own on that
# text, falls, and rises again once the text is known by heart: best.pt is the one to keep.
# Or from a Llama of Hugging Face's, in its own tokens:
#   python data/prepare.py --source=my_text.txt --dataset=mine --tokenizer=FOLDER/tokenizer.json
#   python train.py config/finetune.py --init_from=hf:FOLDER --dataset=mine
# Sizes come from the checkpoint, and your text must be prepared with its tokenizer (GPT-2's for a
# model in GPT-2's tokens, wherever it comes from).

out_dir = "out/finetune"
init_from = "out/gpt/best.pt"
dataset = "mine"

# 4 windows x 1,024 tokens x 8 micro-steps, a fifteenth of pretraining's step
tokens_per_step = 32768
batch_size = 4

# A tenth of the pretraining rate, short, with dropout: the text is small and seen many times
max_iters = 300
warmup_iters = 20
learning_rate = 3e-5
min_lr = 3e-6
dropout = 0.1

eval_interval = 25
eval_windows = 160
log_interval = 5
