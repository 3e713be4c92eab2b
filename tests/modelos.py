"""Modelos minúsculos e completos, de pesos aleatórios, montados com vocabulários reais."""

import json
from pathlib import Path

FIM, EOS = "<|end|>", "<|endoftext|>"
# o chat template de microsoft/Phi-3-mini-4k-instruct
CHAT_TEMPLATE_PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# o do Llama 3, sem as ferramentas
CHAT_TEMPLATE_LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# o do Qwen 2.5, sem as ferramentas: põe uma mensagem de sistema quando a conversa não traz nenhuma
CHAT_TEMPLATE_QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def escrever_tokenizer_model(vocabulario_gguf: Path, destino: Path) -> list[str]:
    """Refaz o `tokenizer.model` (sentencepiece) do Phi-3 a partir do vocabulário em GGUF do llama.cpp.

    Devolve os tokens acrescentados (ids 32000 a 32010), que no Phi-3 ficam fora do sentencepiece.
    """
    from gguf import GGUFReader
    from sentencepiece import sentencepiece_model_pb2 as sp

    campos = GGUFReader(vocabulario_gguf).fields
    tokens = campos["tokenizer.ggml.tokens"].contents()
    scores = campos["tokenizer.ggml.scores"].contents()
    tipos = campos["tokenizer.ggml.token_type"].contents()
    modelo = sp.ModelProto()
    for token, score, tipo in zip(tokens[:32000], scores, tipos, strict=False):
        modelo.pieces.add(piece=token, score=score, type=tipo)
    # no vocabulário em GGUF os três primeiros vêm todos como controle
    for i, tipo in enumerate((2, 3, 3)):
        modelo.pieces[i].type = tipo
    treino = modelo.trainer_spec
    treino.model_type, treino.vocab_size, treino.byte_fallback = 2, 32000, True
    treino.unk_id, treino.bos_id, treino.eos_id, treino.pad_id = 0, 1, 2, -1
    normalizador = modelo.normalizer_spec
    normalizador.name = "identity"
    normalizador.add_dummy_prefix, normalizador.remove_extra_whitespaces = True, False
    (destino / "tokenizer.model").write_bytes(modelo.SerializeToString())
    return tokens[32000:32011]


def construir_phi3(destino: Path, vocabulario_gguf: Path, normalizador_prefixa: bool = False) -> Path:
    """Escreve em `destino` um Phi-3 inteiro de 2 camadas: config, pesos em bf16, tokenizer e chat template reais.

    Há arquivos de tokenizer do Phi-3 das duas espécies: os que põem `▁` antes de cada trecho, no normalizador, e os
    que não põem; o `O` de `<|user|>O que` é `▁O` nos primeiros e `O` nos outros.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

    destino.mkdir(parents=True)
    acrescentados = escrever_tokenizer_model(vocabulario_gguf, destino)
    opcoes = {"lstrip": False, "normalized": False, "single_word": False}
    tabela = {
        str(i): {"content": t, "rstrip": False, "special": True, **opcoes} for i, t in enumerate(("<unk>", "<s>"))
    }
    tabela["2"] = {"content": "</s>", "rstrip": True, "special": False, **opcoes}
    for i, t in enumerate(acrescentados, 32000):
        # como no Phi-3 real: todos, menos o eos, engolem os espaços à direita
        tabela[str(i)] = {"content": t, "rstrip": t != EOS, "special": True, **opcoes}
    (destino / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "add_eos_token": False,
                "added_tokens_decoder": tabela,
                "bos_token": "<s>",
                "eos_token": EOS,
                "pad_token": EOS,
                "unk_token": "<unk>",
                "chat_template": CHAT_TEMPLATE_PHI3,
                "legacy": False,
                "model_max_length": 4096,
                "padding_side": "left",
                "tokenizer_class": "LlamaTokenizer",
            }
        ),
        encoding="utf-8",
    )
    AutoTokenizer.from_pretrained(destino).save_pretrained(destino)
    if normalizador_prefixa:
        tokenizer = json.loads((destino / "tokenizer.json").read_text(encoding="utf-8"))
        espacos = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, espacos]}
        tokenizer["pre_tokenizer"] = None
        (destino / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=32064,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
        dtype=torch.bfloat16,
    )
    modelo = Phi3ForCausalLM(config).to(torch.bfloat16)
    modelo.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[32000, 32001, 32007], pad_token_id=32000)
    modelo.save_pretrained(destino)
    return destino


def construir_llama_ou_qwen(destino: Path, vocabularios: Path, familia: str) -> Path:
    """Escreve em `destino` um Llama ou um Qwen2 de 2 camadas, com o vocabulário e o chat template da família."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    configs = {"llama": LlamaConfig, "qwen": Qwen2Config}
    arquivo = {"llama": "ggml-vocab-llama-bpe.gguf", "qwen": "ggml-vocab-qwen2.gguf"}[familia]
    tokenizer = AutoTokenizer.from_pretrained(vocabularios, gguf_file=arquivo)
    tokenizer.chat_template = {"llama": CHAT_TEMPLATE_LLAMA, "qwen": CHAT_TEMPLATE_QWEN}[familia]
    tokenizer.save_pretrained(destino)
    torch.manual_seed(0)
    config = configs[familia](
        vocab_size=len(tokenizer),
        hidden_size=64,  # com 128 ou 150 mil tokens no vocabulário, é o que decide o tempo de tudo
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(destino)
    return destino
