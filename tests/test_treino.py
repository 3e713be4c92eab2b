"""O treino em linhas cheias dá o mesmo que exemplo por exemplo, e cada um entra uma vez por passagem."""

import itertools
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exemplos_reais, linhas_reais, preparar

import fine_tuning_saude as ft


@pytest.fixture(scope="module")
def exemplos(phi3: Path) -> list[dict[str, Any]]:
    """Quatro exemplos reais, de tamanhos diferentes."""
    return exemplos_reais(phi3, 4)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def tipo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """O tipo em que se calcula numa CPU com AVX-512 bf16 e numa sem ele, seja qual for a desta máquina."""
    monkeypatch.setattr(ft, "tipo_de_calculo", lambda dispositivo: request.param)
    return request.param


def carregar(phi3: Path, atencao: str, checkpointing: bool):  # noqa: ANN201
    """O Phi-3 minúsculo em fp32, com adaptadores que não são zero, pronto para treinar."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("por_exemplo", ft.atencao_por_exemplo)
    base = AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32, attn_implementation=atencao)
    modelo = ft.etapa_4_lora(ft.ler_opcoes([]), base)
    sortear_adaptadores(modelo)
    if checkpointing:
        modelo.gradient_checkpointing_enable({"use_reentrant": False})
    modelo.config.use_cache = False
    return modelo.train()


def sortear_adaptadores(modelo: Any) -> None:
    """Tira do zero, em que nascem, os adaptadores de `modelo`."""
    torch.manual_seed(0)
    for nome, parametro in modelo.named_parameters():
        if "lora_B" in nome:
            torch.nn.init.normal_(parametro, std=0.05)


def gradientes(modelo, linhas: list[list[dict[str, Any]]]) -> tuple[float, dict[str, torch.Tensor]]:  # noqa: ANN001
    """Perda por token e gradientes de um passo sobre essas linhas."""
    modelo.zero_grad()
    lotes = [ft.juntar_exemplos(linha) for linha in linhas]
    total = sum(lote["labels"].numel() for lote in lotes)
    perda = 0.0
    for lote in lotes:
        parte = modelo(**lote, num_items_in_batch=total).loss
        parte.backward()
        perda += parte.item()
    return perda, {nome: p.grad.clone() for nome, p in modelo.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["sem_checkpointing", "com_checkpointing"])
@pytest.mark.parametrize("atencao", ["sdpa", "por_exemplo"])
def test_a_linha_cheia_da_a_mesma_perda_e_os_mesmos_gradientes_que_um_por_um(
    atencao: str, checkpointing: bool, phi3: Path, exemplos: list[dict[str, Any]]
) -> None:
    modelo = carregar(phi3, atencao, checkpointing)
    perda, juntos = gradientes(modelo, [exemplos])
    esperada, sozinhos = gradientes(modelo, [[exemplo] for exemplo in exemplos])
    assert perda == pytest.approx(esperada, abs=1e-5)
    assert len(juntos) == 16
    for nome, gradiente in juntos.items():
        assert sozinhos[nome].abs().max() > 1e-4, nome
        assert (gradiente - sozinhos[nome]).abs().max() < 1e-5, nome


def um_passo(phi3: Path, exemplos: list[dict[str, Any]], **preparo: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Perda e gradientes do Phi-3 minúsculo montado pelas etapas 2 a 4, com adaptadores que não são zero."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    entregue = preparar(phi3)._replace(**preparo)
    modelo = ft.etapa_4_lora(ft.ler_opcoes([]), ft.etapa_3_modelo(entregue, ft.etapa_2_quantizacao("cpu"))[1])
    camadas = [c for c in modelo.modules() if isinstance(c, GradientCheckpointingLayer)]
    assert [c.gradient_checkpointing for c in camadas] == [i < entregue.recalculadas for i in range(2)], "as primeiras"
    sortear_adaptadores(modelo)
    modelo.config.use_cache = False
    tipo = ft.tipo_de_calculo("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=tipo == torch.bfloat16):
        return gradientes(modelo.train(), [exemplos])


def test_recalcular_qualquer_numero_de_camadas_da_a_mesma_perda_e_os_mesmos_gradientes(
    tipo: torch.dtype, phi3: Path, exemplos: list[dict[str, Any]]
) -> None:
    obtidos = [um_passo(phi3, exemplos, recalculadas=quantas) for quantas in range(3)]
    for perda, dos_adaptadores in obtidos[1:]:
        assert perda == obtidos[0][0]
        assert all(torch.equal(gradiente, obtidos[0][1][nome]) for nome, gradiente in dos_adaptadores.items())
        assert max(gradiente.abs().max() for gradiente in dos_adaptadores.values()) > 1e-4


def test_a_base_desfeita_uma_vez_da_a_mesma_perda_e_os_mesmos_gradientes_que_desfeita_a_cada_passo(
    tipo: torch.dtype, phi3: Path, exemplos: list[dict[str, Any]]
) -> None:
    (perda, uma_vez), (a_cada_passo, gradientes_de_4_bits) = (
        um_passo(phi3, exemplos, desfeita=desfeita) for desfeita in (True, False)
    )
    assert perda == a_cada_passo
    assert uma_vez.keys() == gradientes_de_4_bits.keys()
    assert all(torch.equal(gradiente, gradientes_de_4_bits[nome]) for nome, gradiente in uma_vez.items())


def test_a_base_so_vai_desfeita_a_placa_em_que_cabe_sem_recalcular_nada(
    phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    cfg = ft.ler_opcoes(["--dir-saida", str(tmp_path)])
    parametros, _, a_desfazer, memoria = ft.estimar_memoria(cfg, AutoConfig.from_pretrained(phi3), "cuda")
    lineares = 2 * (256 * (3 * 256 + 256 + 2 * 512) + 512 * 256)  # as dos dois blocos; o resto fica em 16 bits
    assert a_desfazer == lineares * (2 - 0.5 - 1 / 64 - 4 / (64 * 256)) and lineares < parametros
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "uma placa")
    for livre, certo in ((memoria[0] + a_desfazer, (0, True)), (memoria[0] + 0.9 * a_desfazer, (0, False))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda livre=livre: (1.0001 * livre / 0.9, livre))
        assert ft.conferir_recursos(cfg, phi3, "cuda") == certo
    com_sobra = (9 * (memoria[0] + a_desfazer), 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: com_sobra)
    poupando = ft.ler_opcoes(["--dir-saida", str(tmp_path), "--gradient-checkpointing", "sim"])
    assert ft.conferir_recursos(poupando, phi3, "cuda") == (2, False)
    with monkeypatch.context() as com_outra:  # cuja placa pode ter menos memória livre
        com_outra.setenv("WORLD_SIZE", "2")
        assert ft.conferir_recursos(cfg, phi3, "cuda") == (0, False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1.0001 * memoria[2] / 0.9, memoria[2]))
    assert ft.conferir_recursos(cfg, phi3, "cuda") == (2, False)


def test_o_estado_paginado_lido_de_um_checkpoint_perde_a_marca_antes_do_primeiro_passo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes
    from transformers import TrainerControl, TrainerState, TrainingArguments

    def novo() -> tuple[torch.nn.Parameter, Any]:
        peso = torch.nn.Parameter(torch.ones(512, 512))
        peso.grad = torch.ones_like(peso)
        return peso, bitsandbytes.optim.PagedAdamW8bit([peso])

    peso, otimizador = novo()
    otimizador.step()
    for valor in otimizador.state[peso].values():
        if isinstance(valor, torch.Tensor):
            valor.is_paged = True  # como numa placa, onde é memória gerenciada
    torch.save(otimizador.state_dict(), tmp_path / "optimizer.pt")
    peso, otimizador = novo()
    otimizador.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    # aqui a memória é comum, e paginá-la encerraria o processo
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda *_: pytest.fail("paginou memória comum"))
    assert otimizador.state[peso]["state1"].is_paged, "a marca sobrevive à leitura"
    argumentos = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    ft.acompanhar(None, tmp_path).on_train_begin(argumentos, TrainerState(), TrainerControl(), optimizer=otimizador)
    assert not otimizador.state[peso]["state1"].is_paged
    otimizador.step()


def test_as_duas_atencoes_dao_a_mesma_perda_que_o_rotulo_comum(phi3: Path, exemplos: list[dict[str, Any]]) -> None:
    perdas = {atencao: gradientes(carregar(phi3, atencao, False), [exemplos])[0] for atencao in ("sdpa", "por_exemplo")}
    modelo, soma, total = carregar(phi3, "sdpa", False), 0.0, 0
    for exemplo in exemplos:  # o caminho do transformers, com os rótulos inteiros e todos os logits
        lote = {nome: torch.tensor([exemplo[nome]]) for nome in ("input_ids", "labels")}
        respostas = sum(rotulo != ft.IGNORADO for rotulo in exemplo["labels"])
        soma, total = soma + modelo(**lote).loss.item() * respostas, total + respostas
    assert perdas["sdpa"] == pytest.approx(soma / total, abs=1e-5)
    assert perdas["por_exemplo"] == pytest.approx(soma / total, abs=1e-5)


@pytest.mark.parametrize("atencao", ["sdpa", "por_exemplo"])
def test_um_exemplo_nao_ve_o_outro_da_mesma_linha(atencao: str, phi3: Path, exemplos: list[dict[str, Any]]) -> None:
    modelo = carregar(phi3, atencao, False).eval()
    trocado = exemplos[0] | {"input_ids": list(reversed(exemplos[0]["input_ids"]))}
    saidas = []
    for primeiro in (exemplos[0], trocado):
        lote = ft.juntar_exemplos([primeiro, exemplos[1]])
        with torch.no_grad():
            saidas.append(modelo(**lote).logits[0])
    do_primeiro = sum(rotulo != ft.IGNORADO for rotulo in exemplos[0]["labels"])
    assert (saidas[0][:do_primeiro] - saidas[1][:do_primeiro]).abs().max() > 0.1, "a troca não mudou nada"
    assert torch.equal(saidas[0][do_primeiro:], saidas[1][do_primeiro:])


def test_so_as_posicoes_que_preveem_resposta_sao_projetadas(phi3: Path, exemplos: list[dict[str, Any]]) -> None:
    lote = ft.juntar_exemplos(exemplos)
    logits = carregar(phi3, "por_exemplo", False)(**lote).logits
    respostas = [rotulo for exemplo in exemplos for rotulo in exemplo["labels"] if rotulo != ft.IGNORADO]
    assert logits.shape == (1, len(respostas), 32064)
    assert lote["labels"].tolist() == [respostas]
    seguintes = lote["input_ids"][0, lote["logits_to_keep"] + 1]
    assert seguintes.tolist() == respostas, "cada posição guardada prevê o token seguinte"


def softcap(phi3: Path):  # noqa: ANN201
    """Um Gemma 2 minúsculo, que muda os logits depois de projetar, com adaptadores que não são zero."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    tamanhos = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    config = Gemma2Config(**tamanhos, vocab_size=32064, num_key_value_heads=2, final_logit_softcapping=0.3)
    modelo = ft.etapa_4_lora(ft.ler_opcoes([]), Gemma2ForCausalLM(config))
    for nome, parametro in modelo.named_parameters():
        if "lora_B" in nome:
            torch.nn.init.normal_(parametro, std=0.5)
    return modelo.train()


@pytest.mark.parametrize(
    "construir", [lambda phi3: carregar(phi3, "por_exemplo", False), softcap], ids=["phi3", "gemma"]
)
def test_a_perda_em_pedacos_e_a_perda_e_os_gradientes_de_uma_vez(
    construir: Any, phi3: Path, exemplos: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modelo = construir(phi3)
    sozinhos = [[exemplo] for exemplo in exemplos]  # o Gemma só separa exemplos de linhas diferentes
    esperada, de_uma_vez = gradientes(modelo, sozinhos)
    cabeca = modelo.get_base_model().get_output_embeddings()
    monkeypatch.setattr(ft, "TOKENS_POR_PEDACO", 7)
    with ft.perda_em_pedacos(modelo.get_base_model()) as nll:
        perda, em_pedacos = gradientes(modelo, sozinhos)
        with torch.no_grad():
            lote = ft.juntar_exemplos(exemplos[:1])
            saida = modelo(**lote).logits
            por_token = nll((saida,), lote["labels"])
    assert modelo.get_base_model().get_output_embeddings() is cabeca
    assert perda == pytest.approx(esperada, abs=1e-5)
    assert any(gradiente.abs().max() > 1e-4 for gradiente in de_uma_vez.values())
    for nome, gradiente in em_pedacos.items():
        assert (gradiente - de_uma_vez[nome]).abs().max() < 1e-5, nome
    with torch.no_grad():
        assert por_token.mean().item() == pytest.approx(modelo(**lote).loss.item(), abs=1e-5)
        projetou = modelo(**lote).logits.shape != saida.shape
    assert projetou == (construir is not softcap), "só se projeta depois o que a sonda mostrou que dá o mesmo"


def test_a_estimativa_conta_os_bytes_que_o_autograd_guarda(
    tipo: torch.dtype, phi3: Path, exemplos: list[dict[str, Any]]
) -> None:
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    # na linha cheia de verdade, o que se guarda para a volta; exemplos de uns 256 tokens, como a estimativa os supõe
    pares = zip(exemplos[:2], exemplos[:1:-1], strict=True)
    exemplos = [{nome: a[nome] + b[nome] for nome in ("input_ids", "labels")} for a, b in pares]
    total = sum(len(exemplo["input_ids"]) for exemplo in exemplos)
    cfg = ft.ler_opcoes(["--max-length", str(total), "--max-tokens-por-linha", str(total)])

    AttentionInterface.register("por_exemplo", ft.atencao_por_exemplo)
    base = AutoModelForCausalLM.from_pretrained(phi3, dtype=tipo, attn_implementation="por_exemplo")
    modelo = ft.etapa_4_lora(cfg, base).train()
    dos_pesos = {peso.untyped_storage().data_ptr() for peso in modelo.parameters()}
    guardados: dict[int, torch.UntypedStorage] = {}

    def guardar(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in dos_pesos:
            guardados[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    lote = ft.juntar_exemplos(exemplos)
    lote = {nome: v for nome, v in lote.items() if nome not in ("labels", "logits_to_keep")}
    ganchos = torch.autograd.graph.saved_tensors_hooks(guardar, lambda tensor: tensor)
    with ganchos, torch.autocast("cpu", torch.bfloat16, enabled=tipo == torch.bfloat16):
        modelo.get_base_model().base_model(**lote, use_cache=False)
    medido = sum(dados.nbytes() for dados in guardados.values())
    *_, estimado = ft.estimar_memoria(cfg, AutoConfig.from_pretrained(phi3), "cpu")
    *_, sem_tokens = ft.estimar_memoria(
        ft.ler_opcoes(["--max-length", "1", "--max-tokens-por-linha", "1"]), AutoConfig.from_pretrained(phi3), "cpu"
    )
    assert medido > 1e6
    assert estimado[0] - sem_tokens[0] == pytest.approx(medido, rel=0.05)


def test_a_estimativa_da_placa_e_a_da_conta_a_mao_para_o_phi3_mini() -> None:
    from transformers import Phi3Config

    parametros, *_, phi3_mini = ft.estimar_memoria(ft.ler_opcoes([]), Phi3Config(), "cuda")
    assert parametros == 3_821_079_552
    assert 2.2e9 < phi3_mini[-1] < 7.0 * 2**30 < phi3_mini[0]
    assert len(phi3_mini) == 33 and phi3_mini[1:] == sorted(phi3_mini[1:], reverse=True)
    # a mesma conta à mão, para a placa. Camadas lineares: por bloco, 3072 × (9216 + 3072 + 16384) + 8192 × 3072, em NF4
    # com dupla quantização; embeddings e projeção de saída, 2 × 32064 × 3072, em 16 bits
    lineares = 32 * (3072 * (9216 + 3072 + 16384) + 8192 * 3072)
    pesos = lineares * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * 2 * 32064 * 3072
    # adaptadores de posto 16: fp32, dois momentos de 8 bits, gradiente em fp32 e a cópia em 16 bits
    de_lora = 32 * 16 * ((3072 + 9216) + (3072 + 3072) + (3072 + 16384) + (8192 + 3072))
    fixo = pesos + de_lora * (4 + 2 + 4 + 2) + 2 * 2 * 3072 * 16384 + 128 * 32064 * 14
    # a entrada de cada bloco, em 16 bits, e as ativações de um, uns 4,3 MB por token nos 32
    recalculando = 2048 * (32 * 2 * 3072 + 4.3e6 / 32)
    assert phi3_mini[-1] == pytest.approx(fixo + recalculando, rel=0.1)


def test_as_linhas_tem_cada_exemplo_uma_vez_e_quase_sem_sobra() -> None:
    sorteio = random.Random(0)
    tamanhos = [sorteio.randint(60, 400) for _ in range(2000)]
    linhas = ft.empacotar(tamanhos, 2048)
    assert sorted(i for linha in linhas for i in linha) == list(range(2000))
    assert all(sum(tamanhos[i] for i in linha) <= 2048 for linha in linhas)
    assert sum(tamanhos) / (2048 * len(linhas)) > 0.98
    outra = ft.empacotar(sorteio.sample(tamanhos, len(tamanhos)), 2048)
    assert len(outra) == len(linhas), "a ordem não muda quantas linhas saem"
    assert ft.empacotar([5, 5, 5], 5) == [[0], [1], [2]] and ft.empacotar([3, 7], 10) == [[1, 0]]


def test_dez_vezes_mais_exemplos_nao_pedem_trinta_vezes_mais_tempo_para_empacotar() -> None:
    sorteio = random.Random(0)
    segundos = []
    for quantos in (20_000, 200_000):  # o menor já não cabe no cache do processador
        tamanhos = [sorteio.randint(60, 400) for _ in range(quantos)]
        vezes = []
        for _ in range(3):  # a menor: o que o sistema faz ao lado só aumenta
            inicio = time.process_time()
            assert sum(map(len, ft.empacotar(tamanhos, 2048))) == quantos
            vezes.append(time.process_time() - inicio)
        segundos.append(min(vezes))
    assert segundos[1] < 30 * segundos[0], segundos


def etapas_2_a_7(cfg: Any, base: Path, treino: list[dict], validacao: list[dict]) -> dict[str, Any]:
    """Treina `base` nestes exemplos, como o programa, e devolve o que a etapa 7 mediu."""
    from datasets import Dataset

    quantizacao = ft.etapa_2_quantizacao("cpu")
    modelo = ft.etapa_4_lora(cfg, ft.etapa_3_modelo(preparar(base), quantizacao)[1])
    argumentos = ft.etapa_6_argumentos(cfg, preparar(base), quantizacao)
    return ft.etapa_7_treinamento(cfg, modelo, Dataset.from_list(treino), Dataset.from_list(validacao), argumentos)


def treinar_doze(phi3: Path, saida: Path, vistos: list[tuple[int, ...]]) -> None:
    """Treina, por duas passagens de quatro passos, doze exemplos de um mesmo tamanho, cada um com um id só seu.

    Anota em `vistos` os exemplos de cada linha, na ordem em que são treinadas.
    """
    opcoes = ["--dir-saida", str(saida), "--num-train-epochs", "2", "--max-length", "60", "--optim", "adamw_torch"]
    cfg = ft.ler_opcoes([*opcoes, "--max-tokens-por-linha", "60", "--save-steps", "2"])
    rotulos = [[ft.IGNORADO] * 10 + [100 + i] * 10 for i in range(12)]
    treino = [{"input_ids": [100 + i] * 20, "labels": rotulos[i], "tokens": 20} for i in range(12)]
    validacao = [{"input_ids": [7] * 8, "labels": [ft.IGNORADO] * 4 + [7] * 4, "tokens": 8}] * 2

    def anotar(linha: list[dict[str, Any]]) -> dict[str, Any]:
        if linha[0]["input_ids"][0] >= 100:
            vistos.append(tuple(sorted(exemplo["input_ids"][0] for exemplo in linha)))
        return original(linha)

    original = ft.juntar_exemplos
    with pytest.MonkeyPatch.context() as trocas:
        trocas.setattr(ft, "juntar_exemplos", anotar)
        etapas_2_a_7(cfg, phi3, treino, validacao)


def test_cada_passagem_ve_cada_exemplo_uma_vez_em_outra_companhia_e_a_retomada_pelo_meio_tambem(
    phi3: Path, tmp_path: Path
) -> None:
    vistos: list[tuple[int, ...]] = []
    treinar_doze(phi3, tmp_path, vistos)
    passagens = vistos[:4], vistos[4:]
    for linhas in passagens:
        assert sorted(i for linha in linhas for i in linha) == list(range(100, 112))
    assert set(passagens[0]) != set(passagens[1])
    # uma queda depois do passo 6, no meio da segunda passagem
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    retomados: list[tuple[int, ...]] = []
    treinar_doze(phi3, tmp_path, retomados)
    assert retomados[-2:] == vistos[6:]


@pytest.mark.parametrize("por_extenso_ate", [0, 512], ids=["sdpa", "por_extenso"])
def test_a_atencao_por_exemplo_com_cabecas_agrupadas_e_a_do_pytorch(
    por_extenso_ate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.functional import scaled_dot_product_attention

    monkeypatch.setattr(ft, "POR_EXTENSO_ATE", por_extenso_ate)
    torch.manual_seed(0)
    limites = [0, 5, 6, 23]
    q, k, v = (torch.randn(1, cabecas, 23, 8, requires_grad=True) for cabecas in (4, 2, 2))
    obtido, _ = ft.atencao_por_exemplo(None, q, k, v, None, cu_seq_lens_q=limites, scaling=0.3)
    pesos = torch.randn_like(obtido)
    do_obtido = torch.autograd.grad((obtido * pesos).sum(), (q, k, v))
    partes = [tuple(t[:, :, a:b] for t in (q, k, v)) for a, b in itertools.pairwise(limites)]
    certos = [scaled_dot_product_attention(*p, is_causal=True, scale=0.3, enable_gqa=True) for p in partes]
    certo = torch.cat(certos, dim=2).transpose(1, 2)
    assert (obtido - certo).abs().max() < 1e-5
    for gradiente, esperado in zip(do_obtido, torch.autograd.grad((certo * pesos).sum(), (q, k, v)), strict=True):
        assert (gradiente - esperado).abs().max() < 1e-5


def test_os_exemplos_ficam_guardados_e_o_que_se_estragou_no_disco_nao_e_usado(phi3: Path, tmp_path: Path) -> None:
    cfg, tokenizer = ft.ler_opcoes(["--dir-saida", str(tmp_path)]), ft.carregar_tokenizer(phi3)
    pares = [ft.Par(i, linha["input"], linha["output"]) for i, linha in enumerate(linhas_reais(30))]
    certos = ft.codificar_dados(cfg, pares, tokenizer).to_list()
    assert [exemplo["tokens"] for exemplo in certos] == [len(exemplo["input_ids"]) for exemplo in certos]
    assert certos[3]["input_ids"] == ft.codificar(tokenizer, "<|end|>", pares[3])["input_ids"]
    (guardado,) = (tmp_path / "checkpoints" / "dados").glob("*.arrow")
    escrito = guardado.stat().st_mtime_ns
    assert ft.codificar_dados(cfg, pares, tokenizer).to_list() == certos
    assert guardado.stat().st_mtime_ns == escrito, "com os mesmos pares, não se tokeniza de novo"
    inteiro = guardado.read_bytes()
    for estragado in (inteiro[: len(inteiro) // 2], inteiro[: len(inteiro) // 2] + bytes(len(inteiro) // 2), b""):
        guardado.write_bytes(estragado)
        assert ft.codificar_dados(cfg, pares, tokenizer).to_list() == certos
    menos = ft.codificar_dados(cfg, pares[:20], tokenizer)
    assert menos["input_ids"][:] == [exemplo["input_ids"] for exemplo in certos[:20]]
    assert not guardado.exists(), "os textos de antes não ficam"


def treinar_curto(phi3: Path, saida: Path, *opcoes: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Treina em quatro exemplos reais, cortados; devolve o que a etapa 7 mediu e o adaptador que gravou."""
    from safetensors.torch import load_file

    comuns = ["--dir-saida", str(saida), "--max-length", "60", "--max-tokens-por-linha", "240"]
    comuns += ["--optim", "adamw_torch"]
    cfg = ft.ler_opcoes([*comuns, *opcoes])
    campos = ("input_ids", "labels")
    exemplos = [{campo: e[campo][:60] for campo in campos} | {"tokens": 60} for e in exemplos_reais(phi3, 8)]
    medido = etapas_2_a_7(cfg, phi3, exemplos[:4], exemplos[4:])
    return medido, load_file(saida / "adaptador_lora" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def que_decora(phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """O Phi-3 minúsculo com a projeção de saída seis vezes maior: consegue ter certeza, e portanto decorar."""
    from safetensors.torch import load_file, save_file

    pasta = Path(shutil.copytree(phi3, tmp_path_factory.mktemp("decora") / "base"))
    pesos = load_file(pasta / "model.safetensors")
    pesos["lm_head.weight"] = pesos["lm_head.weight"] * 6
    save_file(pesos, pasta / "model.safetensors", metadata={"format": "pt"})
    return pasta


DECORAR = ["--num-train-epochs", "40", "--learning-rate", "0.01", "--lr-scheduler-type", "constant"]
DECORAR += ["--save-steps", "5", "--lora-r", "64"]


def test_de_um_treino_que_decora_fica_o_adaptador_de_menor_perda_e_nao_o_ultimo(
    que_decora: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    medido, entregue = treinar_curto(que_decora, tmp_path, *DECORAR)
    validacao = {passo: valor for passo, nome, valor in medido["curva"] if nome == "eval_perda" and passo}
    assert medido["depois"] == min(validacao.values()) == validacao[medido["passo"]]
    assert medido["ultimo"] == validacao[max(validacao)] > medido["depois"] + 0.05, "o último é pior"
    guardados = {c.name: load_file(c / "adapter_model.safetensors") for c in ft.checkpoints(tmp_path / "checkpoints")}
    iguais = {n for n, a in guardados.items() if all(torch.equal(a[nome], v) for nome, v in entregue.items())}
    assert iguais == {f"checkpoint-{medido['passo']}"} and len(guardados) == 3, "os dois últimos e o melhor"


def test_com_paciencia_o_treino_para_e_retomado_para_no_mesmo_passo_com_o_mesmo_adaptador(
    que_decora: Path, tmp_path: Path
) -> None:
    medido, entregue = treinar_curto(que_decora, tmp_path / "inteiro", *DECORAR, "--paciencia", "2")
    medidas = [passo for passo, nome, _ in medido["curva"] if nome == "eval_perda"]
    assert medidas[-1] == medido["passo"] + 2 * 5
    # uma queda antes da última medida, com a paciência já gasta em parte
    shutil.copytree(tmp_path / "inteiro", tmp_path / "caido")
    shutil.rmtree(tmp_path / "caido" / "checkpoints" / f"checkpoint-{medidas[-1]}")
    shutil.rmtree(tmp_path / "caido" / "adaptador_lora")
    retomado, do_retomado = treinar_curto(que_decora, tmp_path / "caido", *DECORAR, "--paciencia", "2")
    assert (retomado["passo"], retomado["depois"]) == (medido["passo"], medido["depois"])
    assert [ponto[0] for ponto in retomado["curva"]] == [ponto[0] for ponto in medido["curva"]]
    assert all(torch.equal(do_retomado[nome], valor) for nome, valor in entregue.items())
    # uma queda depois da última medida: o treino acabou, e só o adaptador se perdeu
    shutil.rmtree(tmp_path / "caido" / "adaptador_lora")
    assert treinar_curto(que_decora, tmp_path / "caido", *DECORAR, "--paciencia", "2")[0] == retomado


def test_treino_de_passagem_fracionada_que_acabou_nao_da_um_passo_a_mais(phi3: Path, tmp_path: Path) -> None:
    # quatro exemplos, um em cada linha: acaba no passo 6, no meio da segunda passagem
    opcoes = ["--num-train-epochs", "1.5", "--lr-scheduler-type", "constant", "--max-tokens-por-linha", "60"]
    antes, _ = treinar_curto(phi3, tmp_path, *opcoes)
    shutil.rmtree(tmp_path / "adaptador_lora")
    assert treinar_curto(phi3, tmp_path, *opcoes)[0] == antes


def test_num_terminal_o_treino_diz_cada_medida_uma_vez_e_retomado_com_os_logging_steps_de_agora(
    phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    opcoes = ["--num-train-epochs", "6", "--save-steps", "2"]
    treinar_curto(phi3, tmp_path, *opcoes, "--logging-steps", "6")
    escrito = capsys.readouterr()
    assert "6/6" in escrito.err and "eval_perda" not in escrito.out + escrito.err, "só a barra"
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    curva = treinar_curto(phi3, tmp_path, *opcoes, "--logging-steps", "1")[0]["curva"]
    assert [passo for passo, nome, _ in curva if nome == "loss"] == [5, 6]


def test_n_linhas_por_lote_dao_as_mesmas_perdas_que_n_lotes_somados(
    phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "tipo_de_calculo", lambda _: torch.float32)  # em bf16, o arredondamento esconderia o resto
    opcoes = ["--num-train-epochs", "4", "--learning-rate", "0.01", "--logging-steps", "1"]
    opcoes += ["--max-tokens-por-linha", "60"]
    curvas = [
        treinar_curto(phi3, tmp_path / nome, *opcoes, f"--{nome}", "2")[0]["curva"]
        for nome in ("per-device-train-batch-size", "gradient-accumulation-steps")
    ]
    for (passo, nome, valor), (outro, _, acumulado) in zip(*curvas, strict=True):
        assert passo == outro and valor == pytest.approx(acumulado, abs=1e-4), nome
    perdas = [valor for _, nome, valor in curvas[0] if nome == "loss"]
    assert len(perdas) == 8 and perdas[0] - perdas[-1] > 0.1


def test_na_placa_o_processo_so_pode_usar_o_que_esta_livre_e_nada_espera_por_ela(
    phi3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # o que se pode ver sem placa: o que se pede ao torch e ao Trainer
    pedidos = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fracao: pedidos.update(fracao=fracao))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda valor: pedidos.update(cudnn=valor))

    def carregar(pasta: Path, **opcoes: object) -> None:
        pedidos.update(opcoes)
        raise InterruptedError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", carregar)
    monkeypatch.setattr(ft, "tipo_de_calculo", lambda _: torch.float32)  # o Trainer recusa bf16 onde não há placa
    preparo, quantizacao = preparar(phi3)._replace(dispositivo="cuda"), ft.etapa_2_quantizacao("cpu")
    with pytest.raises(InterruptedError):
        ft.etapa_3_modelo(preparo, quantizacao)
    assert (pedidos["fracao"], pedidos["cudnn"], pedidos["device_map"]) == (0.75, False, {"": 0})
    assert pedidos["quantization_config"] is quantizacao and quantizacao.bnb_4bit_quant_type == "nf4"
    argumentos = ft.etapa_6_argumentos(ft.ler_opcoes([]), preparo, quantizacao)
    assert argumentos.accelerator_config.non_blocking and not argumentos.logging_nan_inf_filter
    assert argumentos.optim == "paged_adamw_8bit" and not argumentos.use_cpu
