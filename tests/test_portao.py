"""O portão dos dados: repetição, vazamento, dados pessoais e tamanho."""

import json
import random
from pathlib import Path

import pytest
from conftest import executar, linhas_reais

import fine_tuning_saude as ft


def escrever(pasta: Path, pares: list[tuple[str, str]]) -> Path:
    """Grava os pares num JSONL em `pasta`."""
    arquivo = pasta / "dados.jsonl"
    linhas = [json.dumps({"input": p, "output": r}, ensure_ascii=False) for p, r in pares]
    arquivo.write_text("\n".join(linhas) + "\n", encoding="utf-8")
    return arquivo


def ler(arquivo: Path, *opcoes: str) -> tuple[list[ft.Par], int]:
    """Lê o arquivo como o programa o lê."""
    return ft.ler_dados(ft.ler_opcoes(["--arquivo-dados", str(arquivo), *opcoes]))


def textos_reais(campo: str, quantos: int) -> list[str]:
    """Os primeiros textos normalizados do arquivo de dados."""
    return [ft.normalizar(linha[campo]) for linha in linhas_reais(quantos)]


def parecidos_por_forca_bruta(textos: list[str], limite: float) -> set[tuple[int, int]]:
    """A definição, sem índice nenhum: Jaccard de 5-gramas de cada par."""
    g = [{t[i : i + 5] for i in range(max(1, len(t) - 4))} for t in textos]
    return {(j, i) for i in range(len(g)) for j in range(i) if len(g[i] & g[j]) >= limite * len(g[i] | g[j])}


def parafrasear(texto: str, sorteio: random.Random) -> str:
    """Troca duas palavras de lugar com outras e põe um começo de molde, como nos arquivos inflados."""
    palavras = texto.split()
    for _ in range(2):
        palavras[sorteio.randrange(len(palavras))] = sorteio.choice(palavras)
    return sorteio.choice(["Explique: ", "Pode detalhar: ", ""]) + " ".join(palavras)


def test_o_arquivo_de_2000_linhas_e_32_pares_e_barrado_e_a_frase_diz_por_que(tmp_path: Path) -> None:
    perguntas = [
        f"{molde}{tema}?" for tema in "abcdefghij" for molde in ("O que é ", "Explique: o que é ", "Detalhe: ")
    ]
    pares = [(p, f"Resposta sobre {p[-2]}.") for p in (*perguntas, "E a?", "E b?")] * 63
    arquivo = escrever(tmp_path, pares[:2000])
    feito = executar("--arquivo-dados", arquivo, "--demo", pasta=tmp_path)
    assert feito.returncode == 2
    assert "2000 linhas → 32 pares distintos, 10 respostas distintas" in feito.stderr
    assert [a.name for a in tmp_path.iterdir()] == ["dados.jsonl"]
    pares, lidas = ler(arquivo, "--aceitar-repetidos")
    assert len(pares) == 32 and lidas == 2000


def test_muitas_perguntas_para_poucas_respostas_tambem_sao_barradas(tmp_path: Path) -> None:
    arquivo = escrever(tmp_path, [(f"Pergunta número {i}?", f"Resposta {i % 10}.") for i in range(100)])
    with pytest.raises(ft.ErroDeUso, match="100 pares distintos, 10 respostas distintas"):
        ler(arquivo)


def test_par_igual_a_menos_de_forma_conta_uma_vez(tmp_path: Path) -> None:
    iguais = [("O que é  ACS?", "É um agente."), ("o que é acs", "É um agente"), ("O QUE É ACS ?!", "É um agente…")]
    pares, lidas = ler(escrever(tmp_path, [*iguais, ("Outra?", "Sim."), ("Mais uma?", "Não.")]))
    assert (len(pares), lidas) == (3, 5)


def test_mesma_pergunta_com_outra_resposta_e_erro_que_da_as_duas_linhas(tmp_path: Path) -> None:
    arquivo = escrever(tmp_path, [("Qual o prazo?", "Sete dias."), ("Outra?", "Sim."), ("qual o prazo", "Dez dias.")])
    with pytest.raises(ft.ErroDeUso, match=r"dados\.jsonl:3: a pergunta é a mesma da linha 1, com outra resposta"):
        ler(arquivo)


@pytest.mark.parametrize(
    ("texto", "nome"),
    [
        ("O CPF dela é 529.982.247-25.", "um CPF"),
        ("cpf 52998224725", "um CPF"),
        ("Cartão 898 0012 3456 7898? Não: 898001234567892", None),
        ("O cartão é 298 2597 9190 0002.", "um CNS"),
        ("Escreva para maria.silva@exemplo.com.br hoje.", "um e-mail"),
        ("Ligue para (11) 98765-4321.", "um telefone"),
        ("Meu número é 21 2345-6789", "um telefone"),
        ("Ligue 136, 192, 188, 180, 190 ou 193, ou 0800 722 6001.", None),
        ("Lei nº 8.080/1990, Portaria 2.436/2017, RDC 15/2012 e 10.216, de 6/4/2001.", None),
        ("Pressão de 120/80 mmHg em 10/11/2025 e 2.000 a 3.500 pessoas; 111.111.111-12", None),
    ],
)
def test_dado_pessoal_e_achado_e_numero_de_servico_ou_norma_nao(texto: str, nome: str | None) -> None:
    assert ft.achar_dado_pessoal(texto) == nome


def test_dado_pessoal_para_a_execucao_sem_mostrar_o_numero(tmp_path: Path) -> None:
    arquivo = escrever(tmp_path, [("Outra?", "Sim."), ("Quem é?", "É quem tem o CPF 529.982.247-25.")])
    feito = executar("--arquivo-dados", arquivo, pasta=tmp_path)
    assert feito.returncode == 2
    assert "dados.jsonl:2: parece conter um CPF" in feito.stderr and "529" not in feito.stderr
    assert len(ler(arquivo, "--aceitar-dados-pessoais")[0]) == 2


@pytest.mark.parametrize(("campo", "limite"), [("input", 0.65), ("output", 0.5)])
def test_a_busca_de_parecidos_acha_quase_todos_os_que_a_forca_bruta_acha_e_nenhum_outro(
    campo: str, limite: float
) -> None:
    sorteio = random.Random(0)
    textos = textos_reais(campo, 120)
    textos += [parafrasear(texto, sorteio) for texto in textos]
    certos = parecidos_por_forca_bruta([ft.normalizar(t) for t in textos], limite)
    achados = set(ft.achar_parecidos(textos, limite))
    assert achados <= certos and len(achados) >= 0.99 * len(certos) > 40


def test_num_arquivo_de_parafrases_a_validacao_nao_vaza_para_o_treino() -> None:
    sorteio = random.Random(0)
    pares = [ft.Par(i, d["input"], d["output"]) for i, d in enumerate(linhas_reais(80))]
    for copia in range(3):
        muda = [parafrasear(p.pergunta if copia != 1 else p.resposta, sorteio) for p in pares[:80]]
        nova = [
            (m, p.resposta) if copia == 0 else (f"Caso {copia}.{p.origem}?", m)
            for m, p in zip(muda, pares, strict=False)
        ]
        pares += [ft.Par(len(pares) + i, *par) for i, par in enumerate(nova)]
    grupos, ligacoes = ft.agrupar_parecidos(pares)
    treino, validacao = ft.separar_validacao(grupos, 0.2, 42)
    assert ligacoes > 100 and len(treino) + len(validacao) == len(pares) and len(validacao) >= 0.15 * len(pares)
    for campo, limite in (("pergunta", ft.PERGUNTAS_PARECIDAS), ("resposta", ft.RESPOSTAS_PARECIDAS)):
        juntos = [ft.normalizar(getattr(par, campo)) for par in treino + validacao]
        assert all((i < len(treino)) == (j < len(treino)) for j, i in parecidos_por_forca_bruta(juntos, limite))


def test_a_validacao_vem_da_semente_e_do_conteudo_e_nao_da_ordem_das_linhas() -> None:
    pares = [ft.Par(i, d["input"], d["output"]) for i, d in enumerate(linhas_reais(100))]

    def validacao(ordem: list[ft.Par], seed: int) -> list[ft.Par]:
        return sorted(ft.separar_validacao(ft.agrupar_parecidos(ordem)[0], 0.2, seed)[1])

    assert validacao(pares, 42) == validacao(pares[::-1], 42) != validacao(pares, 43)


def test_exemplo_longo_pode_ser_deixado_de_fora_e_contado(tmp_path: Path, phi3: Path) -> None:
    from transformers import AutoTokenizer

    arquivo = escrever(
        tmp_path, [(d["input"], d["output"]) for d in linhas_reais(10)] + [("Conte tudo.", "palavra " * 900)]
    )
    cfg = ft.ler_opcoes(["--arquivo-dados", str(arquivo), "--descartar-longos", "--fracao-validacao", "0.3"])
    treino, validacao = ft.etapa_5_dados(cfg, ft.ler_dados(cfg)[0], AutoTokenizer.from_pretrained(phi3))
    assert len(treino) + len(validacao) == 10
