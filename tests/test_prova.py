"""A prova do resultado: o que se mede, e que o programa acusa cada modo de entregar outra coisa que não o treinado."""

import argparse
import json
import math
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import OPCOES_RAPIDAS, RAIZ, exemplos_reais
from interprete import executavel

import fine_tuning_saude as ft

pytestmark = pytest.mark.usefixtures("filhos_rapidos")
CONVERSOR = RAIZ / "llama.cpp" / "convert_hf_to_gguf.py"


def converter(pasta: Path, destino: Path) -> None:
    """Converte o modelo de `pasta` como a etapa 9 o faz."""
    ft.converter([sys.executable, CONVERSOR, pasta, "--outfile", destino, "--outtype", "f16"])


@pytest.fixture(scope="module")
def exemplos(phi3: Path) -> list[dict]:
    """Seis exemplos reais, codificados como na etapa 5."""
    return exemplos_reais(phi3, 6)


def carregar(pasta: Path, tipo: str):  # noqa: ANN201
    """O modelo de `pasta` nesse tipo."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pasta, dtype=getattr(torch, tipo))


# ---------------------------------------------------------------- as medidas


def test_exemplos_na_mesma_linha_nao_se_veem(phi3: Path, exemplos: list[dict]) -> None:
    modelo = carregar(phi3, "float32")
    juntos = list(ft.logprobs(modelo, exemplos))
    for exemplo, esperado in zip(exemplos, juntos, strict=True):
        (sozinho,) = ft.logprobs(modelo, [exemplo])
        assert sozinho.shape == esperado.shape and len(sozinho) == len(exemplo["labels"]) - exemplo["labels"].count(
            -100
        )
        assert np.abs(sozinho - esperado).max() < 1e-4


def test_calculo_em_fp32_da_o_mesmo_que_o_modelo_em_fp32_e_devolve_os_pesos_como_eram(
    phi3: Path, exemplos: list[dict]
) -> None:
    import torch

    modelo = carregar(phi3, "float16")
    antes = {nome: peso.clone() for nome, peso in modelo.state_dict().items()}
    em_fp16 = np.concatenate(list(ft.logprobs(modelo, exemplos)))
    with ft.calculo_em_fp32(""):
        obtido = np.concatenate(list(ft.logprobs(modelo, exemplos)))
    esperado = np.concatenate(list(ft.logprobs(carregar(phi3, "float32"), exemplos)))
    assert np.abs(obtido - esperado).max() < 1e-4 < np.abs(em_fp16 - esperado).max()
    for nome, peso in modelo.state_dict().items():
        assert peso.dtype == torch.float16 and torch.equal(peso, antes[nome]), nome


def test_calculo_em_fp32_vale_tambem_na_camada_que_chama_outra_no_meio_do_calculo() -> None:
    import torch

    class Camada(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.peso, self.dentro = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float16)), torch.nn.SiLU()

        def forward(self, entrada: torch.Tensor) -> torch.Tensor:
            return self.dentro(entrada @ self.peso) @ self.peso

    camada = Camada()
    with ft.calculo_em_fp32(""):
        assert camada(torch.ones(1, 4)).dtype == torch.float32
    assert camada.peso.dtype == torch.float16


def test_ativacao_que_o_fp16_nao_guarda_e_acusada_antes_de_converter(phi3: Path, exemplos: list[dict]) -> None:
    import torch

    modelo = carregar(phi3, "float16")
    with torch.no_grad():
        modelo.model.layers[0].mlp.gate_up_proj.weight *= 3e5
    with (
        pytest.raises(ft.FalhaNaExecucao, match=r"ativações além de 65504, .* o treino divergiu"),
        ft.calculo_em_fp32("o treino divergiu"),
    ):
        list(ft.logprobs(modelo, exemplos))


def test_o_que_passa_entre_as_camadas_pode_nao_caber_em_fp16_porque_o_llama_cpp_o_guarda_em_fp32(
    phi3: Path, exemplos: list[dict]
) -> None:
    import torch

    modelo = carregar(phi3, "float16")
    with torch.no_grad():  # como no Gemma 3: cada camada normaliza o que lê, e os valores grandes não a alcançam
        modelo.model.layers[0].mlp.gate_up_proj.weight *= 300
        modelo.model.layers[0].mlp.down_proj.weight *= 3e4
    saidas = []
    modelo.model.layers[0].register_forward_hook(lambda _, entradas, saida: saidas.append(saida.abs().max()))
    with ft.calculo_em_fp32("o treino divergiu"):
        (obtido,) = ft.logprobs(modelo, exemplos[:1])
    assert np.isfinite(obtido).all() and max(saidas) > ft.MAIOR_FP16


def test_a_importancia_e_a_media_do_quadrado_de_cada_coluna_da_entrada(phi3: Path, exemplos: list[dict]) -> None:
    import torch

    modelo = carregar(phi3, "float32")
    importancia = ft.medir_importancia(modelo, exemplos)
    ids = torch.tensor([[i for exemplo in exemplos for i in exemplo["input_ids"]]])
    camada = modelo.model.layers[0]
    with torch.no_grad():
        entrada = camada.input_layernorm(modelo.model.embed_tokens(ids))[0]
    esperada = entrada.square().mean(0).numpy()
    assert importancia["model.layers.0.self_attn.qkv_proj"] == pytest.approx(esperada, rel=1e-4)
    assert len(importancia) == 2 * 4 + 1  # quatro camadas lineares por bloco, e a de saída
    with torch.autocast("cpu", torch.bfloat16):  # como na etapa 8, onde há bf16
        em_bf16 = ft.medir_importancia(carregar(phi3, "float16"), exemplos)
    for nome, valores in importancia.items():
        assert np.abs(em_bf16[nome] - valores).mean() < 0.02 * valores.mean(), nome


def test_a_divergencia_e_zero_entre_iguais_e_a_de_livro_entre_diferentes() -> None:
    exemplo = {"labels": [ft.IGNORADO, 0, 1]}
    certa, obtida = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    iguais = ft.juntar_medidas([ft.comparar_logprobs(certa, certa, exemplo)])
    assert iguais["kl"] == 0 and iguais["top1"] == 1
    medida = ft.juntar_medidas([ft.comparar_logprobs(certa, obtida, exemplo)])
    assert medida["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert medida["nll"] == pytest.approx(-(math.log(0.25) + math.log(0.1)) / 2)
    assert medida["top1"] == 0.5


@pytest.mark.parametrize("medida", [(0.0011, 1e-5), (math.nan, 1e-5), (0.0001, 0.001)])
def test_divergencia_ou_ruido_alem_do_limite_encerra_a_execucao(medida: tuple[float, float]) -> None:
    with pytest.raises(ft.FalhaNaExecucao, match=r"x\.gguf não é o modelo final: KL .* \(limite 0\.001\), ruído"):
        ft.exigir_fidelidade("f16", "x.gguf não é o modelo final", dict(kl=medida[0], ruido=medida[1], top1=1))
    ft.exigir_fidelidade("f16", "", {"kl": 0.0009, "ruido": 1e-5, "top1": 0.5})


def test_um_modelo_que_hesita_entre_tokens_passa_se_a_divergencia_e_pequena() -> None:
    # logits quase planos, como os do tamanho real de pesos sorteados: o ruído da quantização troca o mais provável
    sorteio = np.random.default_rng(0)
    logits = 0.3 * sorteio.standard_normal((200, 5000))

    def medir(ruido: float) -> dict[str, float]:
        outros = logits + ruido * sorteio.standard_normal(logits.shape)
        certa, obtida = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, outros))
        return ft.juntar_medidas([ft.comparar_logprobs(certa, obtida, {"labels": [0] * 200})])

    fiel, estragado = medir(0.06), medir(0.3)
    assert fiel["top1"] < 0.8
    ft.exigir_fidelidade("q8_0", "", fiel)
    # e o estrago, que nele quase não muda a KL, é acusado
    assert estragado["kl"] < ft.FIDELIDADE["q4_k_m"][0]
    with pytest.raises(ft.FalhaNaExecucao, match="ruído"):
        ft.exigir_fidelidade("q4_k_m", "", estragado)


def lado(nll: float, respostas: list[str], terminou: bool, outros_assuntos: float | None = None) -> dict:
    """O que `provar_gguf` devolveria para estas respostas, e para as de outros assuntos, se vem a NLL delas."""
    por_exemplo = [{"nll": nll * 10 + i, "tokens": 10} for i in range(len(respostas))]
    lembradas = (
        [{"nll": 10 * outros_assuntos + i / 10, "tokens": 10} for i in range(12)] if outros_assuntos is not None else []
    )
    terminadas = [terminou] * len(respostas)
    return {"por_exemplo": por_exemplo, "respostas": respostas, "terminou": terminadas, "outros_assuntos": lembradas}


def test_o_que_o_treino_nao_melhorou_e_dito() -> None:
    provas = [{"resposta": f"A vacina {nome} fica na geladeira."} for nome in ("BCG", "VIP", "penta", "HPV", "dTpa")]
    certas, erradas = [prova["resposta"] for prova in provas], ["Não sei dizer."] * 5
    iguais = ft.comparar_respostas(provas, lado(2, erradas, True), lado(2, erradas, True), 0)
    assert all(base == final and minima == maxima == 0 for base, final, minima, maxima in iguais.values())
    assert ft.dar_veredito(iguais, 5).startswith("NÃO se mediu queda da perda: de 2,")
    melhor = ft.comparar_respostas(provas, lado(2, erradas, False), lado(1, certas, True), 0)
    assert melhor["perda"][:2] == pytest.approx([2.2, 1.2]) and melhor["chrF"][1] == 100
    assert melhor["cobertura"][:2] == [0, 100] and melhor["terminou"][:2] == [0, 1]
    sim = "Sim, na perda: de 2,200 a 1,200 (-45,5 %). Melhorou: perda, chrF, cobertura, terminou."
    assert ft.dar_veredito(melhor, 5) == sim
    assert ft.dar_veredito(melhor, 4).startswith("4 pergunta(s) de validação são de menos para dizer")
    pior = ft.comparar_respostas(provas, lado(1, certas, True), lado(2, erradas, False), 0)
    nao = "NÃO, a perda piorou: de 1,200 a 2,200 (+83,3 %). Piorou: perda, chrF, cobertura, terminou."
    assert ft.dar_veredito(pior, 5) == nao


def test_o_que_o_modelo_final_esqueceu_de_outros_assuntos_e_dito_numa_frase(execucao_phi3: tuple[Path, dict]) -> None:
    provas = [{"resposta": f"A vacina {nome} fica na geladeira."} for nome in ("BCG", "VIP", "penta", "HPV", "dTpa")]
    respostas = [prova["resposta"] for prova in provas]
    antes = lado(2, respostas, True, outros_assuntos=0.3)
    for depois, esqueceu in ((0.35, False), (1.2, True)):
        comparacao = ft.comparar_respostas(provas, antes, lado(1, respostas, True, outros_assuntos=depois), 0)
        assert comparacao["lembrança"][0] == pytest.approx(0.355) and comparacao["lembrança"][1] > depois
        assert ("Esqueceu parte do que a base sabia" in ft.dar_veredito(comparacao, 5)) == esqueceu
        assert ("Esqueceu parte" in ft.dar_veredito(comparacao, 4)) == esqueceu, "também com poucas perguntas"
        assert "lembrança." not in ft.dar_veredito(comparacao, 5).partition("Esqueceu")[0], "não é melhora nem piora"
    saida, registro = execucao_phi3
    de, para, *_ = registro["comparacao"]["lembrança"]
    linha = next(ln for ln in (saida / "README.md").read_text().splitlines() if "perguntas de outros assuntos" in ln)
    assert f"| {de:.3f} | {para:.3f} |".replace(".", ",") in linha and len(set(ft.OUTROS_ASSUNTOS)) == 12


def test_a_cobertura_conta_numeros_e_palavras_de_conteudo() -> None:
    assert ft.cobertura("Notificar em 24 horas, à vigilância.", "A VIGILÂNCIA recebe em 24 h") == 50
    assert ft.cobertura("Sim.", "Sim") == 0


def test_a_importancia_muda_a_quantizacao_e_a_aproxima_do_modelo(
    execucao_phi3: tuple[Path, dict], phi3: Path, exemplos: list[dict], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    final = execucao_phi3[0] / "modelo_final"
    tokenizer, modelo = AutoTokenizer.from_pretrained(phi3), carregar(final, "float32")
    converter(final, f16 := tmp_path / "f16.gguf")
    ajustes = ft.achar_ajustes(ft.ler_opcoes([]), f16, exemplos, ft.id_do_fim_de_turno(tokenizer))
    with (certas := tmp_path / "certas.npy").open("wb") as arquivo:
        for certa in ft.logprobs(modelo, exemplos):
            np.save(arquivo, certa)
    kl = {}
    for nome, importancia in (("sem", {}), ("com", ft.medir_importancia(modelo, exemplos))):
        ft.quantizar(f16, arquivo := tmp_path / f"{nome}.gguf", "q4_k_m", ajustes, importancia)
        kl[nome] = ft.em_outro_processo(ft.provar_gguf, arquivo, exemplos, certas, ft.ler_opcoes([]), 0)["kl"]
    assert kl["com"] < kl["sem"]


def test_base_que_o_llama_cpp_calcula_de_outro_modo_e_acusada_antes_do_treino(
    phi3: Path, exemplos: list[dict], tmp_path: Path
) -> None:
    import gguf

    converter(phi3, f16 := tmp_path / "f16.gguf")
    cfg = ft.ler_opcoes(["--max-length", "512", "--max-new-tokens", "4"])
    ft.provar_base(cfg, phi3, f16, exemplos[0])
    leitor = gguf.GGUFReader(f16, "r+")
    linha = next(tensor for tensor in leitor.tensors if tensor.name == "blk.0.ffn_down.weight").data
    linha[[3, 4]] = linha[[4, 3]]  # só duas linhas trocadas
    leitor.data.flush()
    with pytest.raises(ft.FalhaNaExecucao, match="não calcula este modelo base como o PyTorch"):
        ft.provar_base(cfg, phi3, f16, exemplos[0])


# ---------------------------------------------------------------- tokenizer


def test_o_llama_cpp_tokeniza_como_o_treino_num_modelo_chatml(demonstracao: tuple[Path, dict]) -> None:
    import llama_cpp
    from transformers import AutoTokenizer

    saida, registro = demonstracao
    tokenizer = AutoTokenizer.from_pretrained(saida / "modelo_final")
    assert ft.achar_fim_de_turno(tokenizer) == "<|im_end|>"
    for arquivo in registro["gguf"]:
        modelo = llama_cpp.Llama(str(saida / arquivo["arquivo"]), vocab_only=True, verbose=False)
        ft.conferir_prompts(modelo, saida / arquivo["arquivo"], exemplos_reais(saida / "modelo_final", 30))
        modelo.close()


# ---------------------------------------------------------------- o cartão


def test_o_cartao_tem_cabecalho_medidas_curva_e_exemplos(execucao_phi3: tuple[Path, dict]) -> None:
    from huggingface_hub import ModelCard
    from PIL import Image

    saida, registro = execucao_phi3
    cartao = ModelCard.load(saida / "README.md")
    assert cartao.data.language == "pt" and cartao.data.pipeline_tag == "text-generation"
    # o adaptador sozinho, de duas matrizes pequenas por camada, provado somado à base
    assert 100_000 < (saida / "novo_modelo-adaptador.gguf").stat().st_size < 1_000_000
    assert "adaptador: KL " in (saida / "execucao.log").read_text(encoding="utf-8")
    for arquivo in registro["gguf"]:
        linha = next(linha for linha in cartao.text.splitlines() if f"`{arquivo['arquivo']}` |" in linha)
        assert f"{arquivo['kl']:.4f}".replace(".", ",") in linha and arquivo["tipo"] in linha
        assert arquivo["geracao_tok_s"] > 0 and arquivo["prompt_tok_s"] > 0 and arquivo["carga_s"] > 0
    assert registro["sha256_dados"] in cartao.text and registro["maquina"] in cartao.text
    assert cartao.text.count("- antes: `") == cartao.text.count("- depois: `") == 3
    assert ft.dar_veredito(registro["comparacao"], 5) in cartao.text
    passos = [passo for passo, nome, _ in registro["perda_validacao"]["curva"] if nome == "eval_perda"]
    assert passos[0] == 0 and len(passos) == 2  # antes do treino e no fim, que vem antes de SAVE_STEPS
    assert f"do passo {registro['perda_validacao']['passo']}, o de menor perda" in cartao.text
    with Image.open(saida / "perda.png") as curva:
        assert curva.width > 600 and len(curva.convert("RGB").getcolors(1 << 20)) > 10


def test_o_cartao_de_uma_base_do_hub_diz_dela_a_licenca_e_nada_diz_desta_maquina(
    execucao_phi3: tuple[Path, dict], tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    saida, registro = execucao_phi3
    opcoes = ["--modelo-base", "meta-llama/Llama-3.2-1B-Instruct", "--dir-saida", str(tmp_path)]
    exemplos = [{"pergunta": "O que é APS?", "resposta": "A *porta* de entrada."}] * 5
    ft.escrever_cartao(ft.ler_opcoes(opcoes), registro, exemplos)
    dados = ModelCard.load(tmp_path / "README.md").data
    assert (dados.license, dados.base_model) == ("llama3.2", "meta-llama/Llama-3.2-1B-Instruct")
    assert dados.base_model_relation == "finetune" and dados.language == "pt"
    for cartao in (tmp_path / "README.md", saida / "README.md"):
        dito = cartao.read_text(encoding="utf-8")
        assert not any(daqui in dito for daqui in (platform.node(), str(RAIZ), str(saida.parent), str(tmp_path)))
        assert f"--lora {registro['adaptador_gguf'][0]['arquivo']}`" in dito


def test_a_linha_do_readme_publica_o_cartao_os_gguf_e_o_adaptador_e_nada_mais(
    execucao_phi3: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.cli.hf import app
    from huggingface_hub.utils import filter_repo_objects

    def publicar(_: object, folder_path: str, allow_patterns: object, ignore_patterns: object, **__: object) -> str:
        todos = [a.relative_to(folder_path).as_posix() for a in Path(folder_path).rglob("*") if a.is_file()]
        publicados.update(filter_repo_objects(todos, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return ""

    publicados: set[str] = set()
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **opcoes: argparse.Namespace(**opcoes))
    monkeypatch.setattr(HfApi, "upload_folder", publicar)
    (linha,) = re.findall("^hf (upload .+)$", (RAIZ / "README.md").read_text(encoding="utf-8"), re.M)
    argumentos = [str(execucao_phi3[0]) if a == "saida" else a for a in shlex.split(linha)]
    app(argumentos, standalone_mode=False)
    do_adaptador = {f"adaptador_lora/{nome}" for nome in ("adapter_config.json", "adapter_model.safetensors", ft.SOMAS)}
    ggufs = {"novo_modelo.gguf", "novo_modelo-q4_k_m.gguf", "novo_modelo-adaptador.gguf"}
    assert publicados == ggufs | do_adaptador | {"README.md", "perda.png", "Modelfile"}


def test_o_registro_soma_os_pesos_da_base(execucao_phi3: tuple[Path, dict], phi3: Path) -> None:
    assert execucao_phi3[1]["sha256_base"] == {arquivo.name: ft.sha256(arquivo) for arquivo in phi3.iterdir()}


# ---------------------------------------------------------------- sabotagens: o programa inteiro e uma mentira

DEPOIS_DE_QUANTIZAR = """
import gguf, numpy as np
original = ft.quantizar
def quantizar(f16, destino, tipo, *resto):
    original(f16, destino, tipo, *resto)
    if destino.name.startswith({arquivo!r}):
        leitor = gguf.GGUFReader(destino, "r+")
        {mentira}
        leitor.data.flush()
ft.quantizar = quantizar
"""
TROCA_O_ADAPTADOR = """
original = ft.converter
def converter(comando):
    original(comando)
    if "lora" in comando[1].name:
        import gguf
        leitor = gguf.GGUFReader(comando[4], "r+")
        leitor.tensors[0].data[:] = 1
        leitor.data.flush()
ft.converter = converter
"""
SABOTAGENS = {
    "gguf_com_o_nome_da_pasta": (
        "original = ft.quantizar\n"
        "ft.quantizar = lambda f16, destino, tipo, ajustes, *resto: original(f16, destino, tipo, {}, *resto)\n",
        ["novo_modelo.gguf: o prompt servido não é o do treino", "GGUF: ", "29871, 13"],
    ),
    "gguf_sem_o_nome_da_base": (
        "original = ft.quantizar\n"
        "def quantizar(f16, destino, tipo, ajustes, importancia):\n"
        "    original(f16, destino, tipo, ajustes | {'general.name': 'minusculo'}, importancia)\n"
        "ft.quantizar = quantizar\n",
        ["novo_modelo.gguf: o prompt servido não é o do treino", "GGUF: ", "[32010, 13, "],
    ),
    "fim_de_turno_errado": (
        DEPOIS_DE_QUANTIZAR.format(
            arquivo="novo_modelo.gguf", mentira="leitor.fields['tokenizer.ggml.eot_token_id'].parts[-1][0] = 32001"
        ),
        ["novo_modelo.gguf: o fim de turno é o token 32001, e o treino usou 32007"],
    ),
    "adaptador_nao_somado": (
        "import peft\npeft.PeftModel.merge_and_unload = lambda modelo: modelo.unload()\n",
        ["o modelo final não é a base mais o adaptador", "requirements.txt: KL "],
    ),
    "tensor_do_gguf_estragado": (
        DEPOIS_DE_QUANTIZAR.format(
            arquivo="novo_modelo-q4_k_m.gguf",  # o segundo: o primeiro, que já passou, também não pode ficar
            mentira="next(t for t in leitor.tensors if t.name == 'blk.0.ffn_down.weight').data[:] = 77",
        ),
        ["novo_modelo-q4_k_m.gguf perdeu demais na quantização", "q5_k_m: KL "],
    ),
    "adaptador_em_gguf_que_nao_e_o_do_treino": (
        TROCA_O_ADAPTADOR,
        ["a base com novo_modelo-adaptador.gguf não é o modelo final"],
    ),
    "template_sem_uma_quebra_de_linha": (
        "original = ft.converter\n"
        "def converter(comando):\n"
        "    pasta = comando[2]\n"
        "    if pasta.name == 'modelo_final':\n"
        "        template = pasta / 'chat_template.jinja'\n"
        "        texto = template.read_text()\n"
        "        assert \"'<|assistant|>\\n' }}\" in texto\n"
        "        template.write_text(texto.replace(\"'<|assistant|>\\n' }}\", \"'<|assistant|>' }}\"))\n"
        "    original(comando)\n"
        "ft.converter = converter\n",
        ["novo_modelo.gguf: o prompt servido não é o do treino", "treino: '<|user|>"],
    ),
}


@pytest.mark.parametrize("sabotagem", SABOTAGENS)
def test_sabotagem_e_acusada_com_mensagem_e_codigo_1(
    sabotagem: str, execucao_phi3: tuple[Path, dict], phi3: Path, tmp_path: Path
) -> None:
    codigo, ditos = SABOTAGENS[sabotagem]
    # uma execução pronta em que se perdeu o que a etapa 9 faz ou, para o merge, também o que faz a 8
    shutil.copytree(execucao_phi3[0], tmp_path / "saida")
    (tmp_path / "saida" / "novo_modelo.gguf").unlink()
    if sabotagem == "adaptador_nao_somado":
        shutil.rmtree(tmp_path / "saida" / "modelo_final")
    programa = f"import sys\nsys.path.insert(0, {str(RAIZ)!r})\nimport fine_tuning_saude as ft\n{codigo}"
    opcoes = ["--modelo-base", phi3, "--dir-saida", tmp_path / "saida", "--dir-llama-cpp", RAIZ / "llama.cpp"]
    comando = [executavel(), "-c", f"{programa}\nsys.exit(ft.main())", *opcoes, *OPCOES_RAPIDAS, "--adaptador-gguf"]
    feito = subprocess.run([*map(str, comando)], cwd=RAIZ, capture_output=True, text=True, encoding="utf-8")
    assert feito.returncode == 1, feito.stdout + feito.stderr
    for dito in ditos:
        assert dito in feito.stderr, feito.stderr
    assert "Traceback" not in feito.stderr and "Concluído" not in feito.stdout
    assert json.loads((tmp_path / "saida" / "execucao.json").read_text())["situacao"] == "falhou"
    assert not (tmp_path / "saida" / "novo_modelo.gguf").exists(), "o que não passou na prova não toma o nome"
    assert not list((tmp_path / "saida").glob(f"{ft.PARCIAL}*")), "nem fica"


def test_gguf_que_nao_abre_e_dito(tmp_path: Path, exemplos: list[dict]) -> None:
    (ruim := tmp_path / "ruim.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ft.FalhaNaExecucao, match=r"não abre .*ruim\.gguf"):
        ft.em_outro_processo(ft.provar_gguf, ruim, exemplos, tmp_path, ft.ler_opcoes([]), 1)


def derrubar_com_tudo(*_: object) -> None:
    """O mesmo, chamado como `provar_gguf`."""
    derrubar(Path())


def derrubar(_: Path) -> None:
    """Morre como o llama.cpp morre num arquivo estragado: sem exceção."""
    import os

    os.abort()


def instrucao_desconhecida(_: Path, erro: str) -> None:
    """Falha como o ctypes do Windows falha quando o processador não tem uma instrução do llama.cpp."""
    raise OSError(erro)


def test_llama_cpp_que_cai_nao_derruba_o_programa(tmp_path: Path) -> None:
    ruim = tmp_path / "ruim.gguf"
    with pytest.raises(ft.FalhaNaExecucao, match=r"caiu ao usar .* o arquivo está estragado"):
        ft.em_outro_processo(derrubar, ruim)
    with pytest.raises(ft.FalhaNaExecucao, match=r"caiu ao usar .*ruim.gguf: outro motivo\."):
        ft.em_outro_processo(instrucao_desconhecida, ruim, "[WinError -1073741795] 0xc000001d", se_cai="outro motivo")
    with pytest.raises(OSError, match="No space left"):  # que tem outra frase
        ft.em_outro_processo(instrucao_desconhecida, ruim, "No space left on device")


def test_llama_cpp_feito_para_outro_processador_e_dito_antes_do_treino(
    phi3: Path, exemplos: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "provar_gguf", derrubar_com_tudo)
    with pytest.raises(
        ft.FalhaNaExecucao, match=r"feito para outro processador: reinstale-o com a linha do README.*--force-reinstall"
    ):
        ft.provar_base(ft.ler_opcoes([]), phi3, tmp_path / "base.gguf", exemplos[0])
