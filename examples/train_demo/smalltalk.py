"""Writes conversations: greetings, questions about a small closed world, follow-ups, and limits.

Every exchange is one question and its answer; a conversation strings a few of them together and
remembers what the user said about themself.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import words
from chat_format import THINK_REQUEST, Document, Message
from sums import sum_exchange, thought
from words import word_table

Exchange = tuple[str, str]
Memory = dict[str, str]

CAPITALS = word_table(
    """France:Paris Italy:Rome England:London Germany:Berlin Spain:Madrid Norway:Oslo
    Austria:Vienna Portugal:Lisbon Greece:Athens Ireland:Dublin Japan:Tokyo Egypt:Cairo
    Peru:Lima Poland:Warsaw Finland:Helsinki Sweden:Stockholm Denmark:Copenhagen
    Belgium:Brussels Hungary:Budapest Kenya:Nairobi Cuba:Havana Canada:Ottawa China:Beijing
    Russia:Moscow Thailand:Bangkok Vietnam:Hanoi Chile:Santiago Turkey:Ankara Iceland:Reykjavik
    Switzerland:Bern Croatia:Zagreb Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Latvia:Riga
    Estonia:Tallinn Lithuania:Vilnius Ukraine:Kyiv Ecuador:Quito Australia:Canberra
    Nepal:Kathmandu Morocco:Rabat Tunisia:Tunis Ghana:Accra Ethiopia:Addis_Ababa India:New_Delhi
    Mexico:Mexico_City Argentina:Buenos_Aires Brazil:Brasilia Iran:Tehran Iraq:Baghdad
    Lebanon:Beirut"""
)
CONTINENTS = word_table(
    """France:Europe Italy:Europe Germany:Europe Spain:Europe Norway:Europe Poland:Europe
    Greece:Europe Sweden:Europe Japan:Asia China:Asia India:Asia Thailand:Asia Vietnam:Asia
    Nepal:Asia Iran:Asia Egypt:Africa Kenya:Africa Ghana:Africa Morocco:Africa Ethiopia:Africa
    Tunisia:Africa Peru:South_America Chile:South_America Brazil:South_America
    Argentina:South_America Ecuador:South_America Canada:North_America Mexico:North_America
    Cuba:North_America"""
)
SPOKEN = word_table(
    """France:French Italy:Italian Germany:German Spain:Spanish Mexico:Spanish Peru:Spanish
    Chile:Spanish Portugal:Portuguese Brazil:Portuguese Japan:Japanese China:Chinese
    Poland:Polish Sweden:Swedish Norway:Norwegian Greece:Greek Turkey:Turkish Egypt:Arabic
    Austria:German England:English Australia:English"""
)
SOUNDS = word_table(
    """dog:woof cat:meow cow:moo duck:quack sheep:baa horse:neigh pig:oink lion:roar owl:hoot
    frog:ribbit bee:buzz mouse:squeak rooster:cock-a-doodle-doo snake:hiss donkey:hee-haw
    wolf:howl crow:caw"""
)
BABIES = word_table(
    """dog:puppy cat:kitten cow:calf duck:duckling sheep:lamb horse:foal pig:piglet lion:cub
    bear:cub frog:tadpole goat:kid deer:fawn hen:chick swan:cygnet kangaroo:joey goose:gosling"""
)
LEGS = word_table(
    """dog:4 cat:4 cow:4 duck:2 spider:8 bee:6 ant:6 horse:4 hen:2 snake:0 fly:6 fish:0 sheep:4
    owl:2 beetle:6 frog:4 lion:4 eagle:2"""
)
HOMES = word_table(
    """bird:nest bee:hive dog:kennel horse:stable rabbit:burrow spider:web lion:den beaver:lodge
    cow:barn pig:sty bear:cave ant:anthill"""
)
COLOR_OF = word_table(
    """sky:blue grass:green snow:white sun:yellow coal:black banana:yellow tomato:red carrot:orange
    plum:purple chocolate:brown cherry:red lemon:yellow cucumber:green milk:white strawberry:red
    blood:red pumpkin:orange frog:green"""
)
OPPOSITES = word_table(
    """hot:cold big:small fast:slow old:young happy:sad up:down left:right day:night black:white
    early:late open:closed wet:dry full:empty light:dark hard:soft high:low rich:poor near:far
    long:short strong:weak clean:dirty loud:quiet easy:difficult good:bad thick:thin true:false
    sweet:sour"""
)
MIXES = {
    "red and blue": "purple",
    "blue and yellow": "green",
    "red and yellow": "orange",
    "black and white": "gray",
    "red and white": "pink",
}
SIDES = {
    "triangle": "three",
    "square": "four",
    "rectangle": "four",
    "pentagon": "five",
    "hexagon": "six",
    "octagon": "eight",
    "circle": "no",
}
HELLOS = {
    "Spanish": "hola",
    "French": "bonjour",
    "German": "hallo",
    "Italian": "ciao",
    "Japanese": "こんにちは",
    "Chinese": "你好",
    "Russian": "привет",
    "Korean": "안녕하세요",
    "Portuguese": "olá",
    "Dutch": "hallo",
    "Polish": "cześć",
    "Swedish": "hej",
    "Arabic": "مرحبا",
    "Greek": "γειά σου",
    "Hindi": "नमस्ते",
}
USES = {
    "hammer": "hit nails",
    "umbrella": "stay dry in the rain",
    "pen": "write",
    "oven": "bake",
    "bed": "sleep",
    "key": "open a lock",
    "broom": "sweep the floor",
    "knife": "cut food",
    "lamp": "make light",
    "boat": "travel on water",
    "clock": "tell the time",
    "camera": "take pictures",
    "map": "find the way",
    "ladder": "climb up high",
    "telescope": "look at the stars",
    "thermometer": "measure the temperature",
}
MAKERS = {
    "bread": "baker",
    "chairs": "carpenter",
    "pictures": "painter",
    "books": "writer",
    "songs": "singer",
    "meals": "cook",
    "clothes": "tailor",
    "shoes": "shoemaker",
}
GROUPS = {
    "fruits": words.FRUITS,
    "colors": words.COLORS,
    "animals": words.ANIMALS,
    "foods": words.FOODS,
    "hobbies": words.HOBBIES,
    "languages": words.LANGUAGES,
    "jobs": words.JOBS,
}
FIXED = {
    "How many days are in a week?": "A week has seven days.",
    "How many months are in a year?": "A year has twelve months.",
    "How many hours are in a day?": "A day has 24 hours.",
    "How many minutes are in an hour?": "An hour has 60 minutes.",
    "How many letters are in the English alphabet?": "The English alphabet has 26 letters.",
    "What is the largest planet?": "The largest planet is Jupiter.",
    "What is the closest star to the Earth?": "The closest star to the Earth is the Sun.",
    "What goes around the Earth?": "The Moon goes around the Earth.",
    "What is water made of?": "Water is made of hydrogen and oxygen.",
    "At what temperature does water freeze?": "Water freezes at 0 degrees Celsius.",
    "At what temperature does water boil?": "Water boils at 100 degrees Celsius.",
    "What do bees make?": "Bees make honey.",
    "What do plants need to grow?": "Plants need water, light, and air to grow.",
    "What is the opposite of yes?": "The opposite of yes is no.",
    "What are the seasons?": "The seasons are spring, summer, fall, and winter.",
    "Is the Earth round?": "Yes, the Earth is round.",
    "Is the sun cold?": "No, the sun is very hot.",
    "Can fish fly?": "Most fish cannot fly. They swim.",
    "Can penguins fly?": "No, penguins cannot fly. They swim well.",
    "What is the largest ocean?": "The largest ocean is the Pacific Ocean.",
    "What is the highest mountain?": "The highest mountain is Mount Everest.",
    "What is an LLM?": "An LLM is a large language model. I am a very small one.",
    "What is pagedserve?": "pagedserve is an inference server for language models. It runs me.",
    "What is PagedAttention?": "It keeps keys and values in blocks, like pages of memory.",
}
JOKES = (
    "Why did the book go to the doctor? Because it hurt its spine.",
    "What do you call a sleeping bull? A bulldozer.",
    "Why did the bicycle fall over? It was two-tired.",
    "What is brown and sticky? A stick.",
    "Why was the math book sad? It had too many problems.",
    "What has hands but cannot clap? A clock.",
)
POEM_LINES = {
    "sea": (
        "The sea is wide, the sea is blue,",
        "it sings a quiet song to you.",
        "The waves come in, the waves go out,",
        "and little boats sail all about.",
    ),
    "moon": (
        "The moon is bright, the moon is round,",
        "it pours its silver on the ground.",
        "It looks at hills, it looks at me,",
        "and sleeps behind the apple tree.",
    ),
    "rain": (
        "The rain is soft, the rain is gray,",
        "it taps my window all the day.",
        "It wakes the seeds, it fills the stream,",
        "and sends me off into a dream.",
    ),
    "cat": (
        "My cat is small, my cat is sly,",
        "she likes to watch the birds fly by.",
        "She sleeps all day, she walks at night,",
        "her yellow eyes are full of light.",
    ),
    "tree": (
        "The tree is old, the tree is tall,",
        "it drops its leaves in early fall.",
        "The birds come home, the squirrels play,",
        "and I sit there at end of day.",
    ),
    "snow": (
        "The snow is white, the snow is deep,",
        "it lays the quiet fields to sleep.",
        "It hides the road, it hides the stone,",
        "and makes the world look newly grown.",
    ),
}
UNKNOWN = """quantum physics|the stock market|the history of Rome|how to write code in Python
|the latest news|politics|how to cook a duck|the meaning of life|machine learning|a good movie
|how engines work|football results|chemistry|philosophy|the French Revolution|black holes
|how to fix a car|taxes|medicine|the theory of relativity|Shakespeare|computer games|biology
|the best phone|world war history|how to invest money|algebra|geology""".replace("\n", "").split(
    "|"
)
UNKNOWN_ASKS = (
    "Explain {t}.",
    "Tell me about {t}.",
    "What do you know about {t}?",
    "Can you explain {t}?",
    "Write an essay about {t}.",
    "I have a question about {t}.",
    "Help me with {t}.",
)
UNKNOWN_ANSWER = (
    "I am a very small demo model, so I do not know about {t}. "
    "I can chat, add numbers, tell stories, write JSON and call tools."
)
WHO = "I am the pagedserve demo model, a very small language model."
ABILITIES = (
    "I can chat, answer simple questions, add numbers, tell stories, write JSON and call tools."
)
SYSTEMS = ("You are a helpful assistant.",) * 4 + (
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a kind and helpful assistant.",
    "You are a helpful assistant. Answer in one sentence.",
    "Be polite.",
    "You are a teacher.",
    "You are the pagedserve demo.",
)


def conversation(rng: random.Random) -> Document:
    """One to six exchanges between a user and the assistant."""
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    memory: Memory = {}
    if rng.random() < 0.4:
        messages += _turns([_greeting(rng, memory)])
    for _ in range(rng.choice((0, 1, 1, 2, 3, 4)) if messages[1:] else rng.choice((1, 1, 2, 3))):
        messages += sum_exchange(rng) if rng.random() < 0.06 else _turns(_topic(rng, memory))
    if len(messages) > 2 and rng.random() < 0.25:
        messages += _turns([_closing(rng)])
    return Document("chat", tuple(messages))


def thinking_fact(rng: random.Random) -> Document:
    """A question about the world under the instruction to think first."""
    question, answer = rng.choice(FACTS)(rng)[0]
    plan = rng.choice(("This is a simple question.", "I know this.", "Let me remember."))
    messages = (
        {"role": "system", "content": THINK_REQUEST},
        {"role": "user", "content": question},
        {"role": "assistant", "content": thought(f"{plan}\n{answer}", answer)},
    )
    return Document("think", messages)


def _turns(exchanges: list[Exchange]) -> list[Message]:
    return [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]


def _topic(rng: random.Random, memory: Memory) -> list[Exchange]:
    if memory and rng.random() < 0.4:
        return [_recall(rng, memory)]
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(FACTS)(rng)
    if draw < 0.72:
        return [_remark(rng, memory)]
    return rng.choice(SKILLS)(rng)


def _greeting(rng: random.Random, memory: Memory) -> Exchange:
    hello = rng.choice(
        (
            "Hello",
            "Hi",
            "Hey",
            "Hello there",
            "Good morning",
            "Hi there",
            "hello",
            "hi",
            "Good evening",
        )
    )
    if rng.random() < 0.35:
        memory["name"] = words.person(rng).split()[0]
        lead = rng.choice(("I am", "My name is", "I'm"))
        return (
            f"{hello}! {lead} {memory['name']}.",
            f"Hello, {memory['name']}! Nice to meet you. How can I help you?",
        )
    if rng.random() < 0.3:
        ask = rng.choice(("How are you?", "How are you today?", "how are you?"))
        return f"{hello}! {ask}", "Hello! I am fine, thank you. How can I help you?"
    end = rng.choice(("!", "!", ".", "", f" {rng.choice(words.EMOJI)}"))
    reply = "Hello! How can I help you today?"
    if "Good" in hello:
        reply = f"{hello}! How can I help you today?"
    return hello + end, f"{reply} 👋" if end.startswith(" ") else reply


def _closing(rng: random.Random) -> Exchange:
    return rng.choice(
        (
            ("Thank you!", "You are welcome!"),
            ("Thanks!", "You are welcome!"),
            ("Thanks a lot.", "You are welcome!"),
            ("Bye!", "Goodbye! Have a nice day!"),
            ("Goodbye.", "Goodbye! Have a nice day!"),
            ("Good night!", "Good night! Sleep well!"),
            ("That was helpful, thank you.", "I am glad that I could help!"),
            ("ok", "Is there anything else that I can do for you?"),
        )
    )


def _remark(rng: random.Random, memory: Memory) -> Exchange:
    """The user says something about themself; it is remembered."""
    kind = rng.choice(("color", "food", "pet", "city", "job", "name"))
    if kind == "name":
        memory["name"] = name = words.person(rng).split()[0]
        return f"My name is {name}.", f"Nice to meet you, {name}!"
    options = {
        "color": words.COLORS,
        "food": words.FOODS,
        "pet": words.ANIMALS,
        "city": words.CITIES,
        "job": words.JOBS,
    }
    memory[kind] = value = rng.choice(options[kind])
    return {
        "color": (f"My favorite color is {value}.", f"{value.capitalize()} is a beautiful color!"),
        "food": (f"I like {value}.", f"{value.capitalize()} is delicious!"),
        "pet": (f"I have {words.with_article(value)}.", f"How nice! A pet {value} must be fun."),
        "city": (f"I live in {value}.", f"{value} is a lovely city!"),
        "job": (
            f"I am {words.with_article(value)}.",
            f"It must be interesting to be {words.with_article(value)}.",
        ),
    }[kind]


def _recall(rng: random.Random, memory: Memory) -> Exchange:
    kind, value = rng.choice(sorted(memory.items()))
    return {
        "name": ("What is my name?", f"Your name is {value}."),
        "color": ("What is my favorite color?", f"Your favorite color is {value}."),
        "food": ("What do I like to eat?", f"You like {value}."),
        "pet": ("What pet do I have?", f"You have {words.with_article(value)}."),
        "city": ("Where do I live?", f"You live in {value}."),
        "job": ("What is my job?", f"You are {words.with_article(value)}."),
    }[kind]


def _relation(
    facts: dict[str, str], asks: tuple[str, ...], answer: str, follow: str = ""
) -> Callable[[random.Random], list[Exchange]]:
    """Questions over one table; `follow` asks the same of another entry."""

    def draw(rng: random.Random) -> list[Exchange]:
        subjects = rng.sample(sorted(facts), 2 if follow and rng.random() < 0.25 else 1)
        exchanges = []
        for index, subject in enumerate(subjects):
            question = follow if index else rng.choice(asks)
            value = facts[subject].replace("_", " ")
            slots = {"x": subject, "ax": words.with_article(subject), "v": value}
            slots |= {
                "av": words.with_article(value),
                "X": words.with_article(subject).capitalize(),
            }
            exchanges.append((question.format(**slots), answer.format(**slots)))
        return exchanges

    return draw


def _fixed(rng: random.Random) -> list[Exchange]:
    return [rng.choice(list(FIXED.items()))]


def _calendar(rng: random.Random) -> list[Exchange]:
    names = words.DAYS if rng.random() < 0.5 else words.MONTHS
    unit = "day" if names is words.DAYS else "month"
    index, step = rng.randrange(len(names)), rng.choice((1, -1))
    side = "after" if step == 1 else "before"
    this, other = names[index], names[(index + step) % len(names)]
    asks = (f"What {unit} comes {side} {this}?", f"Which {unit} is {side} {this}?")
    return [(rng.choice(asks), f"{other} comes {side} {this}.")]


def _identity(rng: random.Random) -> list[Exchange]:
    return [
        rng.choice(
            (
                ("Who are you?", WHO),
                ("What are you?", WHO),
                ("What is your name?", WHO),
                ("Are you a human?", f"No. {WHO}"),
                ("What can you do?", ABILITIES),
                ("Can you help me?", f"Yes! {ABILITIES}"),
                ("Help!", ABILITIES),
                ("How are you?", "I am fine, thank you. How are you?"),
                ("I am fine.", "I am glad to hear that!"),
                ("I am sad.", "I am sorry to hear that. I hope that you feel better soon."),
                ("Are you smart?", "Not very. I am a very small model."),
                ("Who made you?", "I was trained by a script of the pagedserve project."),
            )
        )
    ]


def _unknown(rng: random.Random) -> list[Exchange]:
    topic = rng.choice(UNKNOWN)
    return [(rng.choice(UNKNOWN_ASKS).format(t=topic), UNKNOWN_ANSWER.format(t=topic))]


def _echo(rng: random.Random) -> list[Exchange]:
    draw = rng.random()
    if draw < 0.3:
        phrase = rng.choice(words.UNICODE_PHRASES)
    elif draw < 0.5:
        phrase = " ".join(rng.choice(words.EMOJI) for _ in range(rng.randint(1, 3)))
    else:
        lists = (words.COLORS, words.ANIMALS, words.FOODS, words.NAMES, words.CITIES)
        phrase = " ".join(rng.choice(rng.choice(lists)) for _ in range(rng.randint(1, 4)))
    ask = rng.choice(("Say {p}", "Repeat: {p}", "Repeat after me: {p}", "Echo {p}"))
    return [(ask.format(p=phrase), phrase)]


def _naming(rng: random.Random) -> list[Exchange]:
    group, size = rng.choice(sorted(GROUPS)), rng.randint(2, 5)
    chosen = rng.sample(GROUPS[group], size)
    said = ("two", "three", "four", "five")[size - 2]
    ask = rng.choice(("Name {n} {g}.", "List {n} {g}.", "Tell me {n} {g}.", "Give me {n} {g}."))
    listed = " and ".join(chosen) if size == 2 else f"{', '.join(chosen[:-1])}, and {chosen[-1]}"
    return [(ask.format(n=said, g=group), f"{listed[0].upper()}{listed[1:]}.")]


def _counting(rng: random.Random) -> list[Exchange]:
    start = rng.choice((1, 1, 1, rng.randint(2, 40)))
    end = start + rng.choice((4, 9, 9, 19, rng.randint(2, 30)))
    numbers = ", ".join(map(str, range(start, end + 1)))
    ask = (
        f"Count to {end}." if start == 1 and rng.random() < 0.5 else f"Count from {start} to {end}."
    )
    return [(ask, numbers)]


def _spelling(rng: random.Random) -> list[Exchange]:
    word = rng.choice(words.ANIMALS + words.FRUITS + words.COLORS)
    ask = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}."))
    return [(ask.format(w=word), "-".join(word))]


def _joke(rng: random.Random) -> list[Exchange]:
    asks = ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell me a joke, please.")
    return [(rng.choice(asks), rng.choice(JOKES))]


def _poem(rng: random.Random) -> list[Exchange]:
    subject = rng.choice(sorted(POEM_LINES))
    asks = (
        "Write a poem about the {s}.",
        "Write a short poem about the {s}.",
        "Can you write a poem about the {s}?",
    )
    ask = rng.choice((*asks, "Write a poem.", "Write a short poem."))
    return [(ask.format(s=subject), "\n".join(POEM_LINES[subject]))]


FACTS: tuple[Callable[[random.Random], list[Exchange]], ...] = (
    _relation(
        CAPITALS,
        ("What is the capital of {x}?",) * 3
        + (
            "What's the capital of {x}?",
            "Tell me the capital of {x}.",
            "Which city is the capital of {x}?",
            "capital of {x}?",
            "Do you know the capital of {x}?",
        ),
        "The capital of {x} is {v}.",
        "And of {x}?",
    ),
    _relation(
        CAPITALS,
        ("What is the capital of {x}?", "what is the capital of {x}"),
        "The capital of {x} is {v}.",
        "And what about {x}?",
    ),
    _relation(
        {v.replace("_", " "): k for k, v in CAPITALS.items()},
        ("Which country has the capital {x}?", "{x} is the capital of which country?"),
        "{x} is the capital of {v}.",
        "And {x}?",
    ),
    _relation(
        CONTINENTS,
        ("On which continent is {x}?", "What continent is {x} in?", "Where is {x}?"),
        "{x} is in {v}.",
        "And {x}?",
    ),
    _relation(
        SPOKEN,
        ("What language do people speak in {x}?", "Which language is spoken in {x}?"),
        "People in {x} speak {v}.",
        "And in {x}?",
    ),
    _relation(
        SOUNDS, ("What sound does {ax} make?", "What does {ax} say?"), "{X} says {v}.", "And {ax}?"
    ),
    _relation(
        BABIES,
        ("What is a baby {x} called?", "What do you call a baby {x}?"),
        "A baby {x} is called {av}.",
        "And a baby {x}?",
    ),
    _relation(
        LEGS,
        ("How many legs does {ax} have?", "How many legs has {ax}?"),
        "{X} has {v} legs.",
        "And {ax}?",
    ),
    _relation(
        HOMES,
        ("Where does {ax} live?", "What is the home of {ax}?"),
        "{X} lives in {av}.",
        "And {ax}?",
    ),
    _relation(
        COLOR_OF,
        ("What color is {x}?", "What is the color of {x}?"),
        "The color of {x} is {v}.",
        "And {x}?",
    ),
    _relation(
        OPPOSITES | {v: k for k, v in OPPOSITES.items()},
        ("What is the opposite of {x}?", "Tell me the opposite of {x}.", "Opposite of {x}?"),
        "The opposite of {x} is {v}.",
        "And of {x}?",
    ),
    _relation(
        MIXES,
        ("What do you get when you mix {x}?", "Which color do {x} make?"),
        "When you mix {x}, you get {v}.",
    ),
    _relation(SIDES, ("How many sides does {ax} have?",), "{X} has {v} sides.", "And {ax}?"),
    _relation(
        HELLOS,
        ("How do you say hello in {x}?", "Say hello in {x}.", "What is hello in {x}?"),
        "In {x}, hello is {v}.",
        "And in {x}?",
    ),
    _relation(
        USES,
        ("What is {ax} for?", "What do you do with {ax}?", "Why do people use {ax}?"),
        "You use {ax} to {v}.",
    ),
    _relation(MAKERS, ("Who makes {x}?",), "It is {av} who makes {x}."),
    _calendar,
    _fixed,
    _fixed,
)
SKILLS = (
    _identity,
    _identity,
    _unknown,
    _unknown,
    _echo,
    _naming,
    _counting,
    _spelling,
    _joke,
    _poem,
)
