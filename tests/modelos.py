"""Modelos minúsculos e completos, de pesos aleatórios, montados com vocabulários reais."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

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

# o do Gemma 3: a mensagem de sistema começa a primeira pergunta, e quem responde é "model"
CHAT_TEMPLATE_GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set antes = messages[0]['content'] + '\n\n' -%}"
    "{%- set resto = messages[1:] -%}{%- else -%}{%- set antes = '' -%}{%- set resto = messages -%}{%- endif -%}"
    "{%- for m in resto -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set papel = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + papel + '\n' + (antes if loop.first else '') }}{{ m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# o do Mistral 7B Instruct v0.2: a mensagem de sistema também, [INST] é texto comum, e há um espaço antes da resposta
CHAT_TEMPLATE_MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set sistema = messages[0]['content'] %}"
    "{%- set resto = messages[1:] %}{%- else %}{%- set resto = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in resto %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if loop.first and sistema is defined %}"
    "{{- ' [INST] ' + sistema + '\n\n' + m['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + m['content'] + ' [/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)

# formas de chat template que se acham em modelos de hoje, com os tokens do Llama 3 ou do Qwen
DO_LLAMA = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
PEDIDO_LLAMA = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
DO_QWEN = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PENSAMENTO = "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
RESTO = "{% set resto = messages[1:] if messages[0]['role'] == 'system' else messages %}"
PEDIDO_QWEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
FALAS_QWEN = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}"
    + PENSAMENTO
    + "{%- else %}"
    + DO_QWEN
    + "{%- endif %}{%- endfor %}"
    + PEDIDO_QWEN
)
TEMPLATES = {
    # o do Llama 3.2: a data de hoje na mensagem de sistema
    "llama_com_data": "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    + "{{ strftime_now('%d %b %Y') + '\n\n' }}"
    + "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    + "{{ '<|eot_id|>' }}"
    + RESTO
    + "{% for m in resto %}"
    + DO_LLAMA
    + "{% endfor %}"
    + PEDIDO_LLAMA,
    # o do Gemma e o do Mistral: o sistema no começo da primeira pergunta
    "llama_que_dobra": "{{ bos_token }}{% set pre = '' %}"
    + "{% if messages[0]['role'] == 'system' %}{% set pre = messages[0]['content'] + '\n\n' %}{% endif %}"
    + RESTO
    + "{% for m in resto %}{{ '<|start_header_id|>' + m['role'] + '\n' }}"
    + "{{ (pre if loop.first else '') + m['content'] }}"
    + "{{ '<|eot_id|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}",
    # o do Mistral e o do Llama 2: um espaço antes da resposta
    "llama_com_espaco": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '<|eot_id|>' }}{% endif %}"
    + "{% endfor %}",
    # os que marcam para o treino o que o assistente gera
    "llama_com_generation": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{%- generation %}"
    + DO_LLAMA
    + "{%- endgeneration %}{% else %}"
    + DO_LLAMA
    + "{% endif %}{% endfor %}"
    + PEDIDO_LLAMA,
    # como o do Qwen3: a última resposta ganha um bloco de pensamento vazio que o prompt não tem
    "qwen_que_pensa": FALAS_QWEN + "{%- endif %}",
    # o do Qwen3 como é: o bloco vazio vem também no prompt, quando se pede que não pense
    "qwen_com_chave": FALAS_QWEN
    + "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    + "{%- endif %}",
    # o do R1: o prompt abre o pensamento, que a resposta pronta não traz
    "qwen_r1": "{%- for m in messages %}"
    + DO_QWEN
    + "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}",
}


# o que há de igual em todo modelo daqui, menos o Phi-3
MINUSCULO = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1)


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


def vocabulario_e_notas(tokenizer_model: Path) -> tuple[dict[str, int], dict[str, float]]:
    """O id e a nota de cada peça de um `tokenizer.model`."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(str(tokenizer_model))
    ids = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    return ids, {peca: sp.get_score(i) for peca, i in ids.items()}


def construir_phi3(destino: Path, vocabulario_gguf: Path, normalizador_prefixa: bool = False) -> Path:
    """Escreve em `destino` um Phi-3 inteiro de 2 camadas: config, pesos em bf16, tokenizer e chat template reais.

    Há arquivos de tokenizer do Phi-3 das duas espécies: os que põem `▁` antes de cada trecho, no normalizador, e os
    que não põem; o `O` de `<|user|>O que` é `▁O` nos primeiros e `O` nos outros.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM
    from transformers.convert_slow_tokenizer import generate_merges

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
    tokenizer = json.loads((destino / "tokenizer.json").read_text(encoding="utf-8"))
    # o tokenizer.json publicado funde na ordem das notas, em que a de dois espaços vem no fim; o transformers 5 escreve
    # as fusões na ordem dos ids, em que ela vem primeiro, e nem o sentencepiece nem o llama.cpp leem assim dois espaços
    tokenizer["model"]["merges"] = generate_merges(*vocabulario_e_notas(destino / "tokenizer.model"))
    if normalizador_prefixa:
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
        sliding_window=2047,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
        dtype=torch.bfloat16,
    )
    modelo = Phi3ForCausalLM(config).to(torch.bfloat16)
    modelo.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[32000, 32001, 32007], pad_token_id=32000)
    modelo.save_pretrained(destino)
    return destino


def construir_llama_ou_qwen(destino: Path, vocabularios: Path, familia: str, template: str = "") -> Path:
    """Escreve em `destino` um Llama ou um Qwen2 de 2 camadas, com o vocabulário da família e o seu chat template.

    `template` é o nome de outro, de TEMPLATES.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    configs = {"llama": LlamaConfig, "qwen": Qwen2Config}
    arquivo = {"llama": "ggml-vocab-llama-bpe.gguf", "qwen": "ggml-vocab-qwen2.gguf"}[familia]
    # separar 400 mil pedaços de um memmap custa o dobro que os de um array
    with mock.patch("numpy.memmap", lambda caminho, mode, dtype=np.uint8: np.fromfile(caminho, dtype)):
        tokenizer = AutoTokenizer.from_pretrained(vocabularios, gguf_file=arquivo)
    proprio = {"llama": CHAT_TEMPLATE_LLAMA, "qwen": CHAT_TEMPLATE_QWEN}[familia]
    tokenizer.chat_template = TEMPLATES.get(template, proprio)
    tokenizer.save_pretrained(destino)
    torch.manual_seed(0)
    config = configs[familia](
        **MINUSCULO,  # com 128 ou 150 mil tokens no vocabulário, é a largura que decide o tempo de tudo
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(destino)
    # como em muitos modelos publicados: números do sorteio, sem dizer que se sorteia
    geracao = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "top_p": 0.6}
    (destino / "generation_config.json").write_text(json.dumps(geracao | {"temperature": 0.9}), encoding="utf-8")
    return destino


def escrever_tokenizer_pequeno(destino: Path, vocabulario_gguf: Path, especiais: tuple[str, ...], prefixa: bool) -> Any:
    """Escreve em `destino` o `tokenizer.model` do Phi-3 com umas 2.500 peças; devolve vocabulário e fusões, por nome.

    Ficam `especiais` (os primeiros ids), os bytes, as primeiras fusões e as letras latinas; o resto se escreve em
    bytes. `prefixa` diz se o texto ganha um espaço antes. É o tamanho do vocabulário que decide o tempo de tudo.
    """
    from sentencepiece import sentencepiece_model_pb2 as sp
    from transformers.convert_slow_tokenizer import generate_merges

    destino.mkdir(parents=True)
    escrever_tokenizer_model(vocabulario_gguf, destino)
    modelo = sp.ModelProto.FromString((destino / "tokenizer.model").read_bytes())
    letras = [peca for peca in modelo.pieces[29871:] if peca.piece <= "ſ" or peca.piece in "▁–—…“”"]
    # <unk>, de controle ou, os turnos do Gemma, definidos por quem o fez: estes o conversor só sabe pela tabela ao lado
    tipos = [2 if t == "<unk>" else 4 if t.endswith("_of_turn>") else 3 for t in especiais]
    pecas = [sp.ModelProto.SentencePiece(piece=t, score=0, type=tipo) for t, tipo in zip(especiais, tipos, strict=True)]
    pecas += [*modelo.pieces[3:2200], *letras]
    del modelo.pieces[:]
    modelo.pieces.extend(pecas)
    modelo.trainer_spec.vocab_size, modelo.trainer_spec.unk_id = len(pecas), especiais.index("<unk>")
    modelo.normalizer_spec.add_dummy_prefix = prefixa
    (destino / "tokenizer.model").write_bytes(modelo.SerializeToString())
    vocabulario, notas = vocabulario_e_notas(destino / "tokenizer.model")
    return {"vocab": vocabulario, "merges": generate_merges(vocabulario, notas)}


def construir_gemma3(destino: Path, vocabularios: Path, com_visao: bool = False) -> Path:
    """Escreve em `destino` um Gemma 3 de 6 camadas, das quais 5 só veem 192 tokens, e embeddings presos à saída.

    Com `com_visao`, tem também a torre que lê imagens, como os publicados de 4 bilhões em diante.
    """
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForCausalLM,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        GemmaTokenizer,
        GenerationConfig,
    )

    especiais = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    pecas = escrever_tokenizer_pequeno(destino, vocabularios / "ggml-vocab-phi-3.gguf", especiais, prefixa=False)
    tokenizer = GemmaTokenizer(**pecas, extra_special_tokens=[*especiais[5:]], chat_template=CHAT_TEMPLATE_GEMMA3)
    tokenizer.save_pretrained(destino)
    config = json.loads((destino / "tokenizer_config.json").read_text(encoding="utf-8"))
    opcoes = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    # o publicado a traz; o transformers 5 não a grava
    config["added_tokens_decoder"] = {str(i): {"content": t, **opcoes} for i, t in enumerate(especiais)}
    (destino / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **MINUSCULO,
        vocab_size=len(tokenizer),
        num_hidden_layers=6,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    modelo = Gemma3ForCausalLM(config)
    if com_visao:
        torre = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        torre |= dict(image_size=56, patch_size=14)
        config = Gemma3Config(text_config=config, vision_config=torre, mm_tokens_per_image=4, image_token_index=4)
        modelo = Gemma3ForConditionalGeneration(config)
    modelo = modelo.to(torch.bfloat16)
    modelo.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[1, 6], pad_token_id=0)
    modelo.save_pretrained(destino)
    return destino


def construir_mistral(destino: Path, vocabularios: Path) -> Path:
    """Escreve em `destino` um Mistral de 2 camadas, sem token de pad, com os embeddings presos à saída."""
    import torch
    from transformers import LlamaTokenizer, MistralConfig, MistralForCausalLM

    pecas = escrever_tokenizer_pequeno(destino, vocabularios / "ggml-vocab-phi-3.gguf", ("<unk>", "<s>", "</s>"), True)
    tokenizer = LlamaTokenizer(**pecas, legacy=False, add_bos_token=True, chat_template=CHAT_TEMPLATE_MISTRAL)
    tokenizer.save_pretrained(destino)
    torch.manual_seed(0)
    config = MistralConfig(
        **MINUSCULO,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(destino)
    return destino
