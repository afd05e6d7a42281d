"""Bytes per token by kind of text, beside GPT-2's and GPT-4's encodings: python -m scripts.tok_eval"""

import os
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.common import get_base_dir, print0, write_record
from nanochat.dataset import dataset_dir, iterate_documents, list_shards
from nanochat.tokenizer import Tokenizer, load_tokenizer

# The files tiktoken keeps for an encoding (it names them by the SHA-1 of their address).
CACHED_FILES = {
    "gpt2": ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    "cl100k_base": ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4",),
}

SAMPLES = {
    "English": """\
The ferry left the harbour a little after six, when the fog was still lying on the water like wool. Nobody spoke much. \
An old woman poured tea from a flask and offered the second cup to the boy beside her, who had never been further from \
home than the market town. "You'll see the lighthouse first," she said, "and then, if we're lucky, the seals." He \
nodded, and counted the gulls, and at forty-seven he lost count and began again.""",
    "Python": '''\
def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each run of `window` neighbours, in linear time."""
    if not 1 <= window <= len(values):
        raise ValueError(f"window must be in 1..{len(values)}, got {window}")
    total = sum(values[:window])
    result = [total / window]
    for left, right in zip(values, values[window:]):
        total += right - left
        result.append(total / window)
    return result
''',
    "mathematics": r"""
Let $f(x) = \frac{1}{1 + e^{-x}}$. Then $f'(x) = f(x)\,(1 - f(x))$, so the slope is greatest at $x = 0$, where it is
$\tfrac14$. For independent $X_1, \dots, X_n$ of variance $\sigma^2$ we have
\begin{equation}
  \operatorname{Var}\Bigl(\frac{1}{n} \sum_{i=1}^{n} X_i\Bigr) = \frac{\sigma^2}{n} \le 0.05 \quad (n \ge 20\,\sigma^2).
\end{equation}
Hence 400 draws with $\sigma = 3.5$ give a standard error of $3.5 / \sqrt{400} = 0.175$.""",
    "German": """\
Als der Zug endlich einfuhr, standen auf dem Bahnsteig nur noch drei Reisende. Die Lautsprecherdurchsage war kaum zu \
verstehen, doch das störte niemanden: Man hatte sich an Verspätungen gewöhnt. Der Schaffner grüßte freundlich, prüfte \
die Fahrkarten und erzählte von der Brückenbaustelle, die den Fahrplan seit Wochen durcheinanderbringt. Übermorgen, \
sagte er, müsse alles wieder pünktlich laufen.""",
    "French": """\
Chaque matin, avant l'ouverture de la boulangerie, Élise range les pains dans la vitrine et note la météo sur une \
ardoise. Aujourd'hui, elle a écrit : « ciel couvert, mais il fera doux ». Les premiers clients arrivent déjà ; ils \
achètent une baguette, parfois deux, et restent bavarder près du four. Personne n'est pressé, même si l'école commence \
à huit heures et demie.""",
    "Spanish": """\
En la plaza del pueblo hay una fuente que nadie recuerda haber visto sin agua. Los niños juegan alrededor, los abuelos \
discuten de fútbol y, cuando cae la tarde, alguien saca una guitarra. ¿Quién la construyó? Según el alcalde, fue un \
cantero que llegó de muy lejos; según mi tía, la hicieron entre todos en un verano de sequía. ¡Qué más da! El agua \
sigue fresca.""",
    "Russian": """\
Зимой река замерзает так крепко, что по ней ездят на санях. Мы с братом каждый год ждём этого дня: берём термос с \
горячим чаем, надеваем валенки и идём смотреть, как рыбаки сверлят лунки. Лёд гудит под ногами, а над лесом \
поднимается дым из труб. К вечеру мы возвращаемся домой усталые, но довольные.""",
    "Chinese": """\
清晨的菜市场最热闹。卖豆腐的大叔一边吆喝，一边把热气腾腾的豆浆倒进碗里；隔壁的阿姨正在挑选新鲜的青菜。我骑着自行车经过，\
总会停下来买两个包子，再听他们聊聊昨天的雨。等太阳升到屋顶上面，人群才慢慢散去，街道又恢复了安静。""",
    "Japanese": """\
祖母の家の庭には、大きな柿の木が一本あります。秋になると枝がしなるほど実がつき、近所の子どもたちが集まってきます。\
祖母は縁側に座り、皮をむきながら昔の話をしてくれました。干し柿を軒先につるすころには、山の上に初雪が見えるのです。""",
    "Korean": """\
퇴근길 지하철은 언제나 붐비지만, 나는 창가에 서서 강을 건너는 그 짧은 순간을 좋아한다. 다리 위로 노을이 번지고 물결은 \
금빛으로 반짝인다. 옆에 선 학생은 작은 목소리로 영어 단어를 외우고, 어떤 할아버지는 신문을 접으며 고개를 끄덕인다.""",
    "Arabic": """\
في طرف القرية القديمة بيت صغير تحيط به أشجار الزيتون. كان جدي يجلس كل مساء أمام الباب، يشرب الشاي بالنعناع ويحكي لنا \
عن رحلاته إلى المدن البعيدة. كنا نصغي إليه حتى تظهر النجوم، ثم نعود إلى الداخل ونحن نحلم بالسفر.""",
    "Hindi": """\
बरसात के पहले दिन पूरा मोहल्ला छतों पर आ जाता है। बच्चे काग़ज़ की नावें बनाते हैं और उन्हें गली के पानी में छोड़ देते हैं। \
माँ रसोई में पकौड़े तलती है, और पिताजी अख़बार छोड़कर खिड़की के पास बैठ जाते हैं।""",
    "emoji": """\
ok team 🎉🎉 launch day!! 🚀 who's in? 🙋🏽‍♀️🙋🏻‍♂️🙋 … coffee first ☕️ then 🐛🔨, lunch 🍕🥗 (no 🌶️ pls 😅), \
demo @ 15:00 ⏰ 👩‍💻👨🏿‍💻➡️📈 & if it rains ☔️🌈 we 💃🕺 inside 🏠❤️ #soproud 🥹🫶🏾 🇫🇷🇯🇵🇧🇷""",
}


@dataclass(frozen=True)
class Config:
    """Which dataset's validation text is measured beside the samples."""

    dataset: str = cli.option("builtin", "dataset whose validation text is measured, if it is there")
    max_docs: int = cli.option(1000, "validation documents to measure")


def is_cached(encoding: str) -> bool:
    """Whether tiktoken can load `encoding` without the network (where it would wait long for an absent one)."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return bool(folder) and all(Path(folder, name).is_file() for name in CACHED_FILES[encoding])


def load_tokenizers() -> dict[str, Tokenizer]:
    """Ours, then those of GPT-2 and GPT-4 that are on this machine."""
    tokenizers = {"ours": load_tokenizer()}
    for name in CACHED_FILES:
        if is_cached(name):
            tokenizers[name] = Tokenizer.from_pretrained(name)
        else:
            print0(f"{name}: skipped, not in tiktoken's cache (Tokenizer.from_pretrained({name!r}) downloads it once)")
    return tokenizers


def load_texts(config: Config) -> dict[str, list[str]]:
    """The samples, and the dataset's validation documents when it has been made."""
    texts = {name: [text] for name, text in SAMPLES.items()}
    if (dataset_dir(config.dataset) / "manifest.json").exists():
        validation = iterate_documents(list_shards(config.dataset, "val"))
        texts["validation"] = list(islice(validation, config.max_docs))
    else:
        print0(f"validation: skipped, no dataset {config.dataset} (python -m nanochat.dataset --name {config.dataset})")
    return texts


def measure(texts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """Tokens and bytes per token of each tokenizer, and the ratio of ours to the others' (above 1: ours is shorter)."""
    row: dict[str, Any] = {"bytes": sum(len(text.encode()) for text in texts)}
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(texts)
        for text, one in zip(texts, ids):
            if tokenizer.decode(one) != text:
                raise RuntimeError(f"{name} does not restore a text that begins {text[:40]!r}")
        tokens = sum(map(len, ids))
        row[name] = {"tokens": tokens, "bytes_per_token": row["bytes"] / max(tokens, 1)}
        row[name]["ratio"] = row["ours"]["bytes_per_token"] / row[name]["bytes_per_token"]
    return row


def print_table(rows: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Bytes a token of each text by each tokenizer of `names`, ours first, with the ratio of ours to the others."""
    header = f"{'bytes per token':16}{'bytes':>10}{'ours':>8}"
    print0(header + "".join(f"{name:>14}{'ratio':>7}" for name in names[1:]))
    for text, row in rows.items():
        line = f"{text:16}{row['bytes']:10,}{row['ours']['bytes_per_token']:8.2f}"
        print0(line + "".join(f"{row[name]['bytes_per_token']:14.2f}{row[name]['ratio']:7.2f}" for name in names[1:]))


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    tokenizers = load_tokenizers()
    rows = {name: measure(texts, tokenizers) for name, texts in load_texts(config).items()}
    print_table(rows, list(tokenizers))
    sizes = {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()}
    record = {"stage": "tok_eval", "hash": tokenizers["ours"].hash, "vocab_sizes": sizes, "texts": rows}
    write_record(get_base_dir() / "evals" / "tok_eval.json", record)


if __name__ == "__main__":
    cli.run(main)
