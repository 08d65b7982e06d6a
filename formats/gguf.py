"""A model as one GGUF file for llama.cpp, Ollama and LM Studio, by the `gguf` package."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from formats.hf import ByteLevelBPE
from model import GPTConfig
from text.chat import own_template
from text.files import SHORT, replacing
from text.tokenizer import Tokenizer

NAMES = {  # ours -> GGUF's
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FILE_TYPES = {  # dtype -> LlamaFileType, and what the file's name carries
    "float32": ("ALL_F32", "f32"),
    "float16": ("MOSTLY_F16", "f16"),
    "bfloat16": ("MOSTLY_BF16", "bf16"),
    "q8_0": ("MOSTLY_Q8_0", "q8_0"),
}
Q8_BLOCK = 32  # weights that share a scale
MAX_FLOAT16 = 65504


def write(
    path: Path,
    weights: dict[str, Tensor],
    config: GPTConfig,
    tokens: ByteLevelBPE,
    tok: Tokenizer,
    dtype: str,
    name: str,
    licence: str,
) -> None:
    """Write the file. Norms and biases stay in float32, as llama.cpp wants them.

    Raises ValueError for a model that llama.cpp does not have or that does not fit in dtype,
    OSError when the file cannot be written.
    """
    import gguf

    if config.qk_norm and (config.attention_bias or config.mlp_bias):
        raise ValueError("llama.cpp has no family with both qk_norm and biases; try --to=hf")
    try:
        with replacing(path) as temp:
            writer = gguf.GGUFWriter(temp, "qwen3" if config.qk_norm else "llama")
            with contextlib.closing(writer):
                add_metadata(writer, config, dtype, name, licence)
                add_tokenizer(writer, tokens, config.vocab_size, tok)
                for key, value in weights.items():
                    data = np.ascontiguousarray(interleaved(key, value.float().numpy(), config))
                    kind = gguf.GGMLQuantizationType[number_type(data, dtype)]
                    if kind == gguf.GGMLQuantizationType.F16 and np.abs(data).max() > MAX_FLOAT16:
                        raise ValueError(f"{key} does not fit in float16; write --dtype=bfloat16")
                    writer.add_tensor(gguf_key(key), gguf.quantize(data, kind), raw_dtype=kind)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
    except UnicodeEncodeError as e:
        raise ValueError(f"{path} not written: {SHORT.repr(e.object)} is not UTF-8 text") from e
    except OSError as e:
        raise OSError(f"could not write {path}: {e}") from e


def gguf_key(key: str) -> str:
    """layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    name, kind = key.rsplit(".", 1)
    if name.startswith("layers."):
        _, layer, name = name.split(".", 2)
        return f"blk.{layer}.{NAMES[name]}.{kind}"
    return f"{NAMES[name]}.{kind}"


def number_type(data: np.ndarray[Any, Any], dtype: str) -> str:
    """GGUF's name of the type that a tensor is stored in."""
    if data.ndim == 1 or dtype == "float32":
        return "F32"
    if dtype == "q8_0":
        return "Q8_0" if data.shape[-1] % Q8_BLOCK == 0 else "F16"
    return {"float16": "F16", "bfloat16": "BF16"}[dtype]


def interleaved(key: str, data: np.ndarray[Any, Any], config: GPTConfig) -> np.ndarray[Any, Any]:
    """A tensor with the rows of q_proj and k_proj in the order of llama.cpp's Llama.

    Ours and Hugging Face's turn dimension i of a head together with i + hd/2, llama.cpp's Llama
    2i with 2i + 1; its Qwen3 is as ours.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(key.split(".")[-2])
    if count is None or config.qk_norm:
        return data
    halves = data.reshape(count, 2, config.head_dim // 2, *data.shape[1:])
    turned: np.ndarray[Any, Any] = halves.swapaxes(1, 2).reshape(data.shape)
    return turned


def add_metadata(writer: Any, config: GPTConfig, dtype: str, name: str, licence: str) -> None:
    """What llama.cpp must know of the model beside its tensors."""
    import gguf

    writer.add_name(name)
    writer.add_license(licence)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype][0]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: Any, tokens: ByteLevelBPE, vocab_size: int, tok: Tokenizer) -> None:
    """The vocabulary, as a byte-level BPE with GPT-2's pattern, and what its ids mean.

    llama.cpp stops at the ids of eos, eot and eom, and at those whose texts it knows.
    """
    import gguf

    texts = {i: text for text, i in tokens.vocab.items()}
    unused = {i: f"<|unused {i}|>" for i in range(vocab_size) if i not in texts}
    names = texts | unused
    kinds = gguf.TokenType
    control = {*tokens.special, tok.eot}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names[i] for i in range(vocab_size)])
    writer.add_token_types(
        [
            kinds.CONTROL
            if i in control
            else kinds.UNUSED
            if i in unused
            else kinds.USER_DEFINED  # found in a text before all else
            if i in tokens.added
            else kinds.NORMAL
            for i in range(vocab_size)
        ]
    )
    # llama.cpp refuses a file without merges, which bytes have none of; this one never applies
    none = [[texts[tok.eot], texts[tok.eot]]]
    writer.add_token_merges([" ".join(pair) for pair in tokens.merges or none])
    writer.add_bos_token_id(tok.begin if tok.bos is None else tok.bos)
    eos = tok.eot if tok.eot in tok.ends else min(tok.ends)
    writer.add_eos_token_id(eos)
    others = sorted(tok.ends - {eos})
    for i, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(i)
    if tok.pad is not None:
        writer.add_pad_token_id(tok.pad)
    if template := tok.chat.template if tok.chat else own_template(tok):
        writer.add_chat_template(template)
    writer.add_add_bos_token(bool(tok.prefix))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
