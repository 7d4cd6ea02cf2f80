"""The training text of examples/tiny: little stories, talks and facts, made by a hand-written grammar.

Everything is written for this project; words.txt, plots.txt, frame.txt, talk.txt and animals.txt hold the
words, this file puts them together. `documents(seed)` is an endless, reproducible stream of texts.
`python3 corpus.py 5` prints five of them.
"""
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
IM_START, IM_END = "<|im_start|>", "<|im_end|>"

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\^?)(\w+)\}")
PLURALS = (("potatos", "potatoes"), ("peachs", "peaches"), ("cherrys", "cherries"), ("berrys", "berries"),
           ("lilys", "lilies"), ("daisys", "daisies"), ("poppys", "poppies"))
TAG = re.compile(r'(\w)\.?" (?=((he |she |they )?(said|asked|cried|called|shouted|whispered))\b)')
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


def lines_of(name):
    text = (HERE / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def read_words():
    pairs = (line.split(":", 1) for line in lines_of("words.txt") if line)
    return {name: [w.strip() for w in words.split(",")] for name, words in pairs}


def read_sections(name):
    """The "== title" sections of a file, each a list of its lines."""
    sections = {}
    for line in lines_of(name):
        if line.startswith("== "):
            current = sections[line[3:].strip()] = []
        elif line.strip():
            current.append(line.strip())
    return sections


def read_plots():
    plots = []
    for title, lines in read_sections("plots.txt").items():
        fields = dict(line.split(": ", 1) for line in lines[:2])
        plots.append({"title": title, "about": fields["about"], "moral": fields["moral"], "text": lines[2:]})
    return plots


def read_dialogues(lines):
    """Lines "question | question => answer | answer" as pairs of lists."""
    split = (line.split("=>") for line in lines if line)
    return [([x.strip() for x in re.split(r"\|(?![^\[]*\])", side)] for side in pair) for pair in split]


WORDS = read_words()
PLOTS = read_plots()
FRAME = read_sections("frame.txt")
TALK = [tuple(pair) for pair in read_dialogues(lines_of("talk.txt"))]
QUESTIONS = [tuple(pair) for pair in read_dialogues(FRAME["question"])]
ANIMALS = [[cell.strip() for cell in line.split("|")] for line in lines_of("animals.txt") if line]


def polish(text):
    """Articles, plurals, commas and capitals, which the grammar leaves to us."""
    text = re.sub(r" +", " ", text.replace("\n ", "\n")).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou]|honest|hour)", r"\1n ", text)
    text = TAG.sub(r'\1," ', text)
    for wrong, right in PLURALS:
        text = text.replace(wrong, right)
    # A sentence begins at the start, after an end mark, after a full stop in quotes, and after an opening quote.
    return re.sub(r'(^|\n|[.!?] |\." |(?:^|(?<=\s))")([a-z])', lambda m: m[1] + m[2].upper(), text)


class Story:
    """One drawing from the grammar: remembers what its slots were filled with."""

    def __init__(self, rng):
        self.rng = rng
        self.slots = {}
        world = rng.choice(("child", "animal"))
        for who, prefix in (("A", ""), ("B", "b")):
            sex = rng.choice(("he", "she"))
            self.person(who, prefix, sex, self.name(sex))
            child = {"he": "boy", "she": "girl"}[sex]
            self.slots[prefix + "kind"] = child if world == "child" else self.word("animal" + ("", "1")[who == "B"])
        sex = rng.choice(("he", "she"))
        self.person("E", "e", sex, rng.choice(WORDS[f"{sex} {world}_elder"]))
        sex = rng.choice(("he", "she"))
        self.person("parent", "p", sex, rng.choice(WORDS[f"{sex} parent"]))
        self.slots["home"] = rng.choice(WORDS["home_" + world])

    def person(self, slot, prefix, sex, name):
        self.slots[slot] = name
        for pronoun, form in zip(("he", "him", "his"), PRONOUNS[sex]):
            self.slots[prefix + pronoun] = form

    def name(self, sex):
        """Mostly a name from the list; at times an invented one, so that the model learns to copy names."""
        while True:
            if self.rng.random() < 0.15:
                name = "".join(self.rng.sample(WORDS["syllable"], self.rng.choice((2, 2, 3)))).capitalize()
            else:
                name = self.rng.choice(WORDS[sex + " names"])
            if name != self.slots.get("A"):
                return name

    def word(self, slot):
        """The slot's word, drawn at its first use among those that no slot of the same list has."""
        if slot not in self.slots:
            base = slot.rstrip("0123456789")
            taken = {w for s, w in self.slots.items() if s.rstrip("0123456789") == base}
            self.slots[slot] = self.rng.choice([w for w in WORDS[base] if w not in taken])
        return self.slots[slot]

    def expand(self, text):
        while CHOICE.search(text):
            text = CHOICE.sub(lambda m: self.rng.choice(m[1].split("|")), text)
        return SLOT.sub(lambda m: self.fill(m), text)

    def fill(self, match):
        word = self.word(match[2])
        return word[0].upper() + word[1:] if match[1] else word

    def frame(self, section):
        return self.expand(self.rng.choice(FRAME[section]))

    def tell(self, plot):
        """The whole story; its phrases "about" and "moral" become slots, for requests and questions."""
        chance = self.rng.random
        self.slots["about"] = self.expand(plot["about"])
        self.slots["moral"] = self.expand(plot["moral"])
        body = [self.expand(line) for line in plot["text"]]
        opening = [self.frame("opening")]
        if chance() < 0.5:
            opening.append(self.frame("hobby"))
        if "{B}" in "".join(plot["text"][:2]) and "{B}" not in plot["about"] and chance() < 0.6:
            opening.append(self.frame("friend"))
        ending = [self.frame(part) for part, odds in (("lesson", 0.5), ("closing", 0.5)) if chance() < odds]
        return polish("\n\n".join([" ".join(opening)] + body + ([" ".join(ending)] if ending else [])))


def chat(*turns):
    """Alternating turns of user and assistant in the chat format."""
    roles = ("user", "assistant")
    return "".join(f"{IM_START}{roles[i % 2]}\n{turn}{IM_END}\n" for i, turn in enumerate(turns))


def ask(rng, story, dialogues):
    questions, answers = rng.choice(dialogues)
    return [polish(story.expand(rng.choice(side))) for side in (questions, answers)]


def story_document(rng):
    return Story(rng).tell(rng.choice(PLOTS))


def story_chat(rng):
    story = Story(rng)
    told = story.tell(rng.choice(PLOTS))
    turns = [polish(story.frame("request")), told]
    if rng.random() < 0.3:
        turns += ask(rng, story, QUESTIONS)
    return chat(*turns)


def talk_chat(rng):
    story = Story(rng)
    turns = ask(rng, story, TALK)
    if rng.random() < 0.4:
        turns += animal_turns(rng)
    return chat(*turns)


def animal_turns(rng):
    name, looks, lives, eats, does = rng.choice(ANIMALS)
    facts = (("What does a {} look like?", f"a {name} has {looks}."),
             ("Where does a {} live?", f"a {name} lives {lives}."),
             ("What does a {} eat?", f"a {name} eats {eats}."), ("What does a {} do?", f"a {name} {does}."),
             ("Tell me about the {}.", f"a {name} has {looks}. It lives {lives}. It eats {eats}, and it {does}."),
             ("What is a {}?", f"a {name} is an animal with {looks}. It lives {lives} and eats {eats}."))
    question, answer = rng.choice(facts)
    return [polish(question.format(name)), polish(answer)]


def animal_chat(rng):
    return chat(*animal_turns(rng))


def documents(seed):
    """Endless texts; by weight, mostly stories, a third of them as answers in a chat."""
    rng = random.Random(seed)
    makers, weights = (story_document, story_chat, talk_chat, animal_chat), (55, 30, 8, 7)
    while True:
        yield rng.choices(makers, weights)[0](rng)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for _, text in zip(range(count), documents(int(sys.argv[2]) if len(sys.argv) > 2 else 0)):
        print(text, end="\n\n--------\n\n")
