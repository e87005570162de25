"""Makes a model that is tiny, and says nothing: a Llama of two layers for a real vLLM, with nothing fetched.

    build/vllm/bin/python controlplane/demo/tiny_model.py FOLDER

Run by the Python of vLLM's venv, which has the tokenizer's library, and so importing nothing of this package. The
folder holds a tokenizer, trained on this package's own source, and the model's shape, but no weights: vLLM makes random
ones up (`--load-format dummy`). What such a model says is a salad of words, `max_tokens` long with `ignore_eos`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT_TOKENS = 32_768
_VOCABULARY = 4096
_UNKNOWN, _BEGIN, _PADDING, _TURN, _TURN_ENDS = _SPECIAL = ("<unk>", "<s>", "</s>", "<|turn|>", "<|turn_ends|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{_TURN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{_TURN_ENDS}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{_TURN}assistant\n{{% endif %}}"
)


def make(folder: Path) -> None:
    """Write the model into the folder, over what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {word: tokenizer.token_to_id(word) for word in _SPECIAL}
    special_ids = {"bos_token_id": ids[_BEGIN], "eos_token_id": ids[_TURN_ENDS], "pad_token_id": ids[_PADDING]}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": _UNKNOWN,
            "bos_token": _BEGIN,
            "eos_token": _TURN_ENDS,
            "pad_token": _PADDING,
            "model_max_length": CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    _write(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT_TOKENS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            **special_ids,
        },
    )
    _write(folder / "generation_config.json", {"do_sample": True, **special_ids})


def _tokenizer() -> Tokenizer:
    """Of bytes, so that any prompt can be said in it, joined to what occurs often in this package's source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    source = sorted(map(str, Path(__file__).parents[1].rglob("*.py")))
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(source, trainer)
    return tokenizer


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
