"""The built-in data set: a grammar and a seed generate a small world of stories. It needs no download.

A prompt asks for a story. The corpus answers with uneven quality, as people do: some stories change the animal, thing
or place, some end sadly, some stop early, some repeat a sentence. `judge` is the simulated person and the gold
measure. The reward model and PPO never read it: the reward model sees only which of two stories was preferred.

    python -m data.tales            write the files and print a few rows of each
"""

import hashlib
import itertools
import random
import re
from pathlib import Path

from data.files import replacing, write_jsonl

FOLDER = Path("out/data/tales")
MEASURES = "data/tales.py:judge,data/tales.py:grammar"
SEED = 1  # of the corpus, the same for every run: a run's own seed does not change the corpus

WORDS = {
    "adjective": "shy brave tiny grey clever sleepy kind proud".split(),
    "animal": "owl fox bear mouse frog duck".split(),
    "thing": "lantern kite drum hat key bell".split(),
    "colour": "red blue green white black golden".split(),
    "place": "lake hill barn river forest meadow".split(),
    "spot": "stone log bush leaf".split(),
    "helper": "bee snail beetle robin".split(),
}
FAVOURITES = {  # what stories change to: no prompt asks for these
    "animal": "cat dog horse".split(),
    "thing": "sword crown cake".split(),
    "place": "castle city sea".split(),
}
SLOTS = ("adjective", "animal", "colour", "thing", "place")
PROMPT = "Tell me about a {adjective} {animal} who lost a {colour} {thing} near the {place}."
OPENING = [
    "Once a {adjective} {animal} lived near the {place}.",
    "Near the {place} there lived a {adjective} {animal}.",
    "A {adjective} {animal} had a home near the {place}.",
]
LOSS = [
    "One day the {animal} lost a {colour} {thing} near the {place}.",
    "One night the {colour} {thing} was gone from the {place}.",
    "The {animal} dropped a {colour} {thing} by the {place}.",
]
SEARCH = ["It looked under a {spot}.", "It asked a {helper} for help.", "The {animal} walked all day."]
FOUND = [
    "Soon the {thing} lay by the {spot}.",
    "Then the {animal} found the {thing}.",
    "A {helper} brought the {thing} back.",
]
NOT_FOUND = ["But the {thing} was never found.", "The {thing} had sunk into the mud."]
HAPPY = ["The {animal} was happy again.", "It danced and sang until morning.", "The {animal} smiled and went home."]
SAD = ["The {animal} cried all night.", "It went home alone."]
SENTENCES = OPENING + LOSS + SEARCH + FOUND + NOT_FOUND + HAPPY + SAD


def _patterns(templates: list[str]) -> re.Pattern:
    slots = {slot: f"(?:{'|'.join(words + FAVOURITES.get(slot, []))})" for slot, words in WORDS.items()}
    return re.compile("|".join(re.escape(t).replace(r"\{", "{").replace(r"\}", "}").format(**slots) for t in templates))


GRAMMAR, HAPPY_END, ANY_END = _patterns(SENTENCES), _patterns(HAPPY), _patterns(HAPPY + SAD)
DARK = _patterns(NOT_FOUND + SAD)
ASKED = re.compile(PROMPT.replace(".", r"\.").format(**{slot: rf"(?P<{slot}>\w+)" for slot in WORDS}))


def write_story(wish: dict[str, str], rng: random.Random) -> str:
    """Write one answer of the corpus to a wish (a word for each of SLOTS). The answer may have random faults."""
    told = dict(wish)
    for slot, favourites in FAVOURITES.items():
        if rng.random() < 0.2:  # the story changes a word
            told[slot] = rng.choice(favourites)
    sad = rng.random() < 0.4
    plan = [OPENING, LOSS] + [SEARCH] * rng.choice((0, 1, 1, 2)) + [NOT_FOUND if sad else FOUND, SAD if sad else HAPPY]
    story: list[str] = []
    for templates in plan:
        story.append(rng.choice([t for t in templates if t not in story]))
    if rng.random() < 0.12:  # the story repeats a sentence
        index = rng.randrange(1, len(story))
        story.insert(index, story[index - 1])
    written = {}  # template → sentence: a repeated one has the same words
    for template in dict.fromkeys(story):
        written[template] = template.format(**told, spot=rng.choice(WORDS["spot"]), helper=rng.choice(WORDS["helper"]))
    words = " ".join(written[template] for template in story).split(" ")
    if rng.random() < 0.12:  # the story stops early
        words = words[: rng.randrange(6, len(words) - 1)]
    return " " + " ".join(words)


def sentences(story: str) -> list[str]:
    """Return the story's sentences. The last one may lack its full stop."""
    return [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", story) if s.strip()]


def grammar(prompt: str, response: str) -> float:
    """Return the share of sentences, in [0, 1], that the grammar can produce."""
    told = sentences(response)
    return sum(bool(GRAMMAR.fullmatch(s)) for s in told) / len(told) if told else 0.0


def judge(prompt: str, response: str) -> float:
    """Score how well the story answers the prompt, in [0, 1].

    The requested animal, thing and place (and no other), and a happy ending, each give a quarter. The sum is multiplied
    by the share of grammatical sentences. A repeated sentence halves the score. A missing ending also halves it.
    """
    wish, told = ASKED.fullmatch(prompt.strip()), sentences(response)
    if wish is None or not told:
        return 0.0
    words = re.findall(r"\w+", response)
    kept = sum({w for w in words if w in WORDS[slot] + FAVOURITES[slot]} == {wish[slot]} for slot in FAVOURITES)
    happy = bool(HAPPY_END.fullmatch(told[-1])) and not any(DARK.fullmatch(s) for s in told)
    score = (kept + happy) / 4 * grammar(prompt, response)
    if len(set(told)) < len(told):
        score /= 2
    if not ANY_END.fullmatch(told[-1]):
        score /= 2
    return score


def rows() -> dict[str, list[dict]]:
    """Return the rows of every file. The files use disjoint wishes, but "pretrain" and "sft" use the same ones."""
    rng = random.Random(SEED)
    wishes = [dict(zip(SLOTS, words)) for words in itertools.product(*(WORDS[slot] for slot in SLOTS))]
    rng.shuffle(wishes)
    asked = [{"prompt": PROMPT.format(**wish)} for wish in wishes]
    texts = []
    for wish in rng.choices(wishes[:4_000], k=8_000):
        prompt = PROMPT.format(**wish) if rng.random() < 0.5 else ""
        texts.append({"text": prompt + write_story(wish, rng)})
    pairs = [row | {"completion": write_story(w, rng)} for w, row in zip(wishes[:4_000] * 4, asked[:4_000] * 4)]
    prompts = {"compare": asked[4_000:5_000], "ppo": asked[5_000:9_800], "eval": asked[9_800:10_312]}
    return {"pretrain": texts, "sft": pairs} | prompts


def path(name: str) -> str:
    """Return the path of the file `name`. Writes all files if it is missing, or another version of this module's."""
    target = FOLDER / f"{name}.jsonl"
    stamp = FOLDER / "version"
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if not target.exists() or not stamp.exists() or stamp.read_text() != version:
        for file, content in rows().items():
            write_jsonl(FOLDER / f"{file}.jsonl", content)
        with replacing(stamp) as file:
            file.write(version)
    return str(target)


if __name__ == "__main__":
    for name, content in rows().items():
        print(f"{path(name)}: {len(content):,} rows", *content[:3], sep="\n  ")
