"""As regras do arquivo de dados; a veracidade de cada linha é trabalho de leitura, descrito em DADOS.md."""

import collections
import re
import statistics
import unicodedata

import pytest
from conftest import linhas_reais

import fine_tuning_saude as ft

# tema → quantas perguntas se espera; pode variar 10 % por tema
TEMAS = {
    "SUS: base legal e controle social": 48,
    "PNAB, equipes e território": 88,
    "Acesso e acolhimento": 59,
    "Cofinanciamento e indicadores": 30,
    "e-SUS APS e sistemas de informação": 62,
    "Redes de atenção e regulação": 48,
    "ACS, ACE e visita domiciliar": 58,
    "Imunização e rede de frio": 123,
    "Pré-natal e puerpério": 88,
    "Saúde da mulher": 69,
    "Saúde da criança": 89,
    "Adolescente, escola e homem": 53,
    "Pessoa idosa": 58,
    "Saúde bucal": 44,
    "Atenção domiciliar e cuidados paliativos": 38,
    "Hipertensão e risco cardiovascular": 78,
    "Diabetes": 64,
    "Asma e DPOC": 35,
    "Alimentação, tabaco e atividade física": 68,
    "Assistência farmacêutica": 58,
    "Saúde mental, álcool e outras drogas": 68,
    "IST, HIV e hepatites": 59,
    "Tuberculose e hanseníase": 59,
    "Arboviroses, zoonoses e peçonhentos": 64,
    "Vigilância, trabalhador e ambiente": 55,
    "Violência e equidade": 77,
    "Segurança do paciente e procedimentos": 54,
    "Urgências na APS": 48,
    "Promoção, PICS e Bolsa Família": 34,
    "Ética, LGPD e limites do assistente": 45,
    "Queixas comuns na APS": 114,
    "Medicamentos: doses, trocas e receitas": 65,
}
NORMA = (
    r"(Constituição Federal/1988|Emenda Constitucional nº|Lei nº|Lei Complementar nº|Decreto nº|Decreto-Lei nº|"
    r"Medida Provisória nº|Portaria( de Consolidação| Conjunta| Interministerial)? ?[A-Za-z/\-]* ?nº|"
    r"Resolução (Conjunta CNJ/CNMP|CNS|CIT|RDC Anvisa|Cofen|CFM|CFO|CFF|CFP|CFN|CFESS|Coffito|Conanda|Conama|CNAS|"
    r"CD/FNDE|CD/ANPD) nº|"
    r"Instrução Normativa|Norma Regulamentadora nº|Nota Técnica|Nota Informativa|Ofício Circular)"
)
ORGAO = (
    r"(Ministério da Saúde|INCA|Anvisa|Fiocruz|Conasems|Conass|Conitec|Funasa|CVV|Ministério d[aeo] [^.]+|"
    r"Supremo Tribunal Federal|Tribunal Superior do Trabalho|Sociedade Brasileira de [^.]+|Conselho [^.]+|"
    r"Organização (Pan-Americana|Mundial) da Saúde)\. .+"
)
PALAVRAS_DE_LIGACAO = """
a à ao aos as às o os um uma uns umas de da do das dos em na no nas nos num numa por pela pelo pelas pelos
para com sem sob sobre entre até desde após antes durante contra e ou mas se que quem qual quais quando quanto
quanta quantos quantas onde como porque quê é são foi ser está estão estar há tem têm ter deve devem pode
podem não sim já só também mais menos muito cada todo toda todos todas algum alguma outro outra este esta esse
essa isso isto aquele seu sua seus suas ele ela eles elas lhe me meu minha nós eu você vocês então ainda
depois mesmo mesma faz fazer preciso precisa existe significa serve acontece diferença
"""


@pytest.fixture(scope="module")
def linhas() -> list[dict[str, str]]:
    """As linhas do arquivo de dados."""
    return linhas_reais()


def esqueleto(pergunta: str) -> str:
    """A pergunta sem números, nomes e termos do tema: só as palavras de ligação, com `_` no lugar do resto."""
    partes: list[str] = []
    ligacao = set(PALAVRAS_DE_LIGACAO.split())
    for palavra in re.findall(r"[\w-]+", unicodedata.normalize("NFKC", pergunta)):
        parte = palavra.casefold() if palavra.casefold() in ligacao else "_"
        if parte != "_" or partes[-1:] != ["_"]:
            partes.append(parte)
    return " ".join(partes)


def test_cada_linha_tem_as_quatro_chaves_e_nada_mais(linhas: list[dict[str, str]]) -> None:
    for numero, linha in enumerate(linhas, 1):
        assert list(linha) == ["input", "output", "tema", "fonte"], numero
        assert all(isinstance(v, str) and v == v.strip() and v for v in linha.values()), numero
        assert all("\n" not in linha[chave] for chave in ("input", "tema", "fonte")), numero


def test_nao_ha_pergunta_resposta_ou_par_repetido(linhas: list[dict[str, str]]) -> None:
    for campo in ("input", "output"):
        assert len({ft.normalizar(linha[campo]) for linha in linhas}) == len(linhas), campo


@pytest.mark.parametrize(("campo", "limite"), [("input", ft.PERGUNTAS_PARECIDAS), ("output", ft.RESPOSTAS_PARECIDAS)])
def test_nao_ha_quase_duplicatas(linhas: list[dict[str, str]], campo: str, limite: float) -> None:
    achados = list(ft.achar_parecidos([linha[campo] for linha in linhas], limite))
    assert not achados, [[linhas[i][campo] for i in par] for par in achados[:5]]


def test_nenhuma_abertura_de_cinco_palavras_passa_de_um_e_meio_por_cento(linhas: list[dict[str, str]]) -> None:
    aberturas = collections.Counter(" ".join(ft.normalizar(linha["input"]).split()[:5]) for linha in linhas)
    assert aberturas.most_common(1)[0][1] <= 0.015 * len(linhas), aberturas.most_common(3)


def test_nenhum_esqueleto_de_frase_passa_de_meio_por_cento(linhas: list[dict[str, str]]) -> None:
    esqueletos = collections.Counter(esqueleto(linha["input"]) for linha in linhas)
    assert esqueletos.most_common(1)[0][1] <= 0.005 * len(linhas), esqueletos.most_common(3)


def test_as_respostas_tem_de_12_a_180_palavras_e_mediana_de_35_a_90(linhas: list[dict[str, str]]) -> None:
    tamanhos = [len(linha["output"].split()) for linha in linhas]
    assert min(tamanhos) >= 12 and max(tamanhos) <= 180
    assert 35 <= statistics.median(tamanhos) <= 90


def test_as_respostas_terminam_em_pontuacao_e_nao_tem_marcacao(linhas: list[dict[str, str]]) -> None:
    for numero, linha in enumerate(linhas, 1):
        assert linha["output"][-1] in ".!?)", numero
        assert not re.search(r"\*\*|^#|https?://", linha["output"]), numero


def test_cada_fonte_nomeia_documento_e_ano_numa_forma_conhecida(linhas: list[dict[str, str]]) -> None:
    for numero, linha in enumerate(linhas, 1):
        for fonte in linha["fonte"].split("; "):
            assert re.match(f"{NORMA}|{ORGAO}", fonte), (numero, fonte)
            assert re.search(r"\b(19|20)\d\d\b", fonte), (numero, fonte)


def test_cada_tema_esta_com_a_sua_parte(linhas: list[dict[str, str]]) -> None:
    contagem = collections.Counter(linha["tema"] for linha in linhas)
    assert set(contagem) == set(TEMAS)
    fora = {t: (contagem[t], n) for t, n in TEMAS.items() if abs(contagem[t] - n) > 0.1 * n}
    assert not fora


def test_o_arquivo_tem_exatamente_2000_linhas(linhas: list[dict[str, str]]) -> None:
    assert len(linhas) == 2000


def test_ao_menos_25_respostas_de_limites_levam_a_pessoa_ao_servico(linhas: list[dict[str, str]]) -> None:
    servico = re.compile(r"\b(UBS|SAMU|192|188|UPA|unidade|equipe|serviço|médic[oa]|secretaria|farmac)", re.I)
    encaminham = [li for li in linhas if li["tema"].startswith("Ética") and servico.search(li["output"])]
    assert len(encaminham) >= 25


def test_nao_ha_dado_pessoal(linhas: list[dict[str, str]]) -> None:
    for numero, linha in enumerate(linhas, 1):
        assert ft.achar_dado_pessoal(f"{linha['input']}\n{linha['output']}") is None, numero


def test_ao_menos_300_perguntas_sao_como_as_pessoas_digitam(linhas: list[dict[str, str]]) -> None:
    # curtas, ou começadas em minúscula, ou sem pontuação no fim
    perguntas = [linha["input"] for linha in linhas]
    digitadas = [p for p in perguntas if len(p.split()) <= 8 or p[0].islower() or p[-1] not in "?.!"]
    assert len(digitadas) >= 300
    assert sum(p[0].islower() for p in perguntas) >= 150 and sum(len(p.split()) <= 5 for p in perguntas) >= 25


def test_ao_menos_200_respostas_dao_passos_numerados_na_ordem(linhas: list[dict[str, str]]) -> None:
    com_passos = [numeros for linha in linhas if (numeros := re.findall(r"^(\d+)\. ", linha["output"], re.M))]
    assert len(com_passos) >= 200
    for numeros in com_passos:
        assert numeros == [str(i) for i in range(1, len(numeros) + 1)], numeros


def test_ao_menos_60_linhas_respondem_a_quem_pede_dose_ou_troca_de_remedio(linhas: list[dict[str, str]]) -> None:
    assert sum(linha["tema"] == "Medicamentos: doses, trocas e receitas" for linha in linhas) >= 60


def test_menos_de_um_terco_das_respostas_abre_com_artigo_e_ha_respostas_curtas(linhas: list[dict[str, str]]) -> None:
    respostas = [linha["output"] for linha in linhas]
    assert sum(bool(re.match(r"[AO]s? ", resposta)) for resposta in respostas) < len(respostas) / 3
    assert sum(len(resposta.split()) <= 40 for resposta in respostas) >= 200


def test_cada_documento_tem_um_nome_so(linhas: list[dict[str, str]]) -> None:
    nomes = collections.defaultdict(set)
    for fonte in {fonte for linha in linhas for fonte in linha["fonte"].split("; ")}:
        if "art." not in fonte:
            nomes["".join(re.findall(r"\w", fonte.casefold()))].add(fonte)
    assert not [iguais for iguais in nomes.values() if len(iguais) > 1]
