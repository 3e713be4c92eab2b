"""Que base cabe em que máquina: python tests/medir_bases.py [--medir].

Da forma publicada de cada modelo (camadas, larguras, vocabulário), sem pesos, tira com a conta do próprio programa a
memória do treino em GPU e na CPU, com todas as camadas recalculadas, a RAM que o merge pede e o tamanho do arquivo
servido em q4_k_m. Com `--medir`, treina de verdade uns passos das duas menores formas, de pesos sorteados, com exemplos
do arquivo de dados, e diz os tokens por segundo e as horas que as 2.000 linhas pediriam.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from conftest import exemplos_reais, preparar

import fine_tuning_saude as ft

BITS_DO_Q4_K_M = 4.85  # por peso, em média, num modelo cujas larguras são múltiplas de 256
COMUNS = dict(tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def formas() -> dict[str, tuple[Any, str]]:
    """{nome: (config publicada, licença)}."""
    from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

    def llama(hidden: int, meio: int, camadas: int, cabecas: int, chaves: int, vocabulario: int) -> LlamaConfig:
        opcoes = dict(num_hidden_layers=camadas, num_attention_heads=cabecas, num_key_value_heads=chaves)
        return LlamaConfig(hidden_size=hidden, intermediate_size=meio, vocab_size=vocabulario, **opcoes, **COMUNS)

    def qwen3(hidden: int, meio: int, camadas: int, cabecas: int) -> Qwen3Config:
        opcoes = dict(num_hidden_layers=camadas, num_attention_heads=cabecas, num_key_value_heads=8, head_dim=128)
        return Qwen3Config(hidden_size=hidden, intermediate_size=meio, vocab_size=151_936, **opcoes, **COMUNS)

    def gemma3(hidden: int, meio: int, camadas: int, cabecas: int, chaves: int) -> Gemma3TextConfig:
        opcoes = dict(num_hidden_layers=camadas, num_attention_heads=cabecas, num_key_value_heads=chaves, head_dim=256)
        return Gemma3TextConfig(hidden_size=hidden, intermediate_size=meio, vocab_size=262_144, **opcoes, **COMUNS)

    # a de 4 bilhões vem com a torre de visão, que o programa carrega e o GGUF não traz
    visao = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896)
    return {
        "SmolLM2 360M": (llama(960, 2560, 32, 15, 5, 49_152), "Apache 2.0"),
        "Qwen3 0.6B": (qwen3(1024, 3072, 28, 16), "Apache 2.0"),
        "Gemma 3 1B": (gemma3(1152, 6912, 26, 4, 1), "Gemma"),
        "Llama 3.2 1B": (llama(2048, 8192, 16, 32, 8, 128_256), "Llama 3.2"),
        "SmolLM2 1.7B": (llama(2048, 8192, 24, 32, 32, 49_152), "Apache 2.0"),
        "Qwen3 1.7B": (qwen3(2048, 6144, 28, 16), "Apache 2.0"),
        "Llama 3.2 3B": (llama(3072, 8192, 28, 24, 8, 128_256), "Llama 3.2"),
        "Phi-3-mini": (Phi3Config(), "MIT"),
        "Gemma 3 4B": (Gemma3Config(text_config=gemma3(2560, 10_240, 34, 8, 4), vision_config=visao), "Gemma"),
        "Qwen3 4B": (qwen3(2560, 9728, 36, 32), "Apache 2.0"),
    }


def medir(config: Any, demo: Path) -> tuple[float, float]:
    """Treina oito linhas de 1.024 tokens; devolve tokens/s e as horas de três passagens por 1.900 exemplos."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporaria:
        cfg = ft.ler_opcoes(["--dir-saida", temporaria, "--max-tokens-por-linha", "1024"])
        exemplos = [{**e, "tokens": len(e["input_ids"])} for e in exemplos_reais(demo, 60)]
        linhas = ft.Linhas(Dataset.from_list(exemplos).select_columns(["input_ids", "labels", "tokens"]), cfg)
        torch.manual_seed(0)
        base = Path(temporaria) / "base"
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
        # os ids da demonstração cabem no vocabulário de todas as formas
        ft.carregar_tokenizer(demo).save_pretrained(base)
        quantizacao = ft.etapa_2_quantizacao("cpu")
        modelo = ft.etapa_4_lora(cfg, ft.etapa_3_modelo(preparar(base), quantizacao)[1]).train()
        modelo.config.use_cache = False
        tipo, medidas = quantizacao.bnb_4bit_compute_dtype, []
        with ft.perda_em_pedacos(modelo.get_base_model()):
            otimizador = torch.optim.AdamW([p for p in modelo.parameters() if p.requires_grad], lr=2e-4)
            for i in range(8):
                lote, inicio = ft.juntar_exemplos(linhas[i]), time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=tipo != torch.float32):
                    modelo(**lote).loss.backward()
                otimizador.step()
                otimizador.zero_grad()
                medidas.append((lote["input_ids"].numel(), time.perf_counter() - inicio))
        tokens, segundos = map(sum, zip(*medidas[2:], strict=True))  # as duas primeiras aquecem
        por_passagem = 1900 * sum(e["tokens"] for e in exemplos) / len(exemplos)
        return tokens / segundos, 3 * por_passagem / (tokens / segundos) / 3600


def main() -> None:
    """Imprime a tabela."""
    import torch
    from transformers import AutoModelForCausalLM

    ft.acalmar_bibliotecas()
    cfg = ft.ler_opcoes([])
    colunas = ["base", "licença", "parâmetros", "arquivo servido", "memória da placa"]
    colunas += ["RAM, CPU com bf16", "RAM, CPU sem bf16", "RAM do merge"]
    print(f"| {' | '.join(colunas)} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for nome, (config, licenca) in formas().items():
        treinos = []
        for onde, tipo in (("cuda", torch.bfloat16), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
            with mock.patch.object(ft, "tipo_de_calculo", return_value=tipo):  # o de outra máquina
                parametros, *_, memoria = ft.estimar_memoria(cfg, config, onde)
            treinos.append(memoria[-1])  # com todas as ativações recalculadas
        with torch.device("meta"):
            do_texto = AutoModelForCausalLM.from_config(config.get_text_config()).num_parameters()
        servido = do_texto * BITS_DO_Q4_K_M / 8 / 1e9
        tamanhos = [f"{parametros / 1e9:.2f} bi", f"{servido:.2f} GB"]
        tamanhos += [f"{m / 2**30:.1f} GiB" for m in (*treinos, ft.RAM_DO_MERGE * 2 * parametros)]
        print(f"| {nome} | {licenca} | {' | '.join(tamanhos).replace('.', ',')} |")
    if "--medir" in sys.argv:
        with tempfile.TemporaryDirectory() as pasta:
            demo = ft.preparar_modelo_demo(ft.ler_opcoes(["--demo", "--dir-saida", pasta]))
            for nome in ("SmolLM2 360M", "Qwen3 0.6B"):
                por_segundo, horas = medir(formas()[nome][0], demo)
                print(f"{nome}: {por_segundo:.0f} tokens/s no treino; as 2.000 linhas, três passagens: {horas:.1f} h")


if __name__ == "__main__":
    main()
