"""The word lists that every generator draws from; it knows no grammar and no task."""

from __future__ import annotations

import random


def word_list(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def phrase_list(text: str) -> list[str]:
    """The phrases of a text, set apart by bars."""
    return text.replace("\n", "").split("|")


def word_table(text: str) -> dict[str, str]:
    """A table written as `key:value` words."""
    return dict(pair.split(":") for pair in text.split())


GIRLS = word_list(
    """Mia Anna Lily Sara Emma Nora Ella Ruby Clara Alice Zoe Maya Ivy Rosa Lena Julia Eva Hannah
    Grace Lucy Molly Nina Olga Tara Vera Wendy Amy Bella Cora Daisy Freya Greta Holly Ida June
    Kate Laura Maria Naomi Olive Paula Rita Sofia Tess Una Yara Zoë Renée"""
)
BOYS = word_list(
    """Tom Ben Max Leo Sam Jack Noah Finn Oscar Hugo Paul David Adam Luke Omar Felix Theo Peter
    Ivan Karl Milo Nico Otto Ray Simon Toby Victor Will Alex Bruno Carl Dan Eric Frank George
    Henry Isaac Jonas Kurt Liam Marco Nils Owen Pablo Ravi Sven Tim José Jürgen"""
)
NAMES = GIRLS + BOYS
SURNAMES = word_list(
    """Smith Brown Miller Lopez Chen Khan Rossi Silva Novak Berg Fischer Martin Moreau Patel Kim
    Sato Haddad Okafor Jensen Larsen Murphy Walker Young Baker Hill Stone Wood Field King Reed"""
)
CITIES = word_list(
    """Paris Rome London Berlin Madrid Oslo Vienna Lisbon Athens Dublin Tokyo Cairo Lima Delhi
    Seoul Sydney Boston Chicago Toronto Prague Warsaw Helsinki Stockholm Copenhagen Brussels
    Amsterdam Zurich Geneva Milan Venice Naples Munich Hamburg Porto Seville Barcelona Lyon Nice
    Bangkok Hanoi Nairobi Lagos Denver Seattle Austin Dallas Miami Montreal Kyoto Osaka Mumbai
    Istanbul Budapest Krakow Riga Quito Havana Bogota Santiago Melbourne Auckland"""
)
ANIMALS = word_list(
    """fox rabbit bear mouse cat dog duck owl horse goat hedgehog squirrel frog turtle lion tiger
    elephant monkey penguin donkey sheep lamb beaver badger otter deer wolf parrot"""
)
COLORS = word_list("red blue green yellow orange purple pink brown black white gray silver")
FOODS = word_list(
    """pizza soup bread rice pasta salad cheese pancakes noodles curry tacos sushi porridge stew
    pie cake cookies honey yogurt"""
)
FRUITS = word_list("apple pear plum cherry banana orange lemon peach grape melon mango fig")
COUNTABLE = word_list(
    """apples pears plums books coins shells stamps marbles eggs flowers stones cards cookies
    pencils stickers buttons tickets lemons cups balls keys stars"""
)
PRODUCTS = word_list(
    """lamp chair table backpack bottle kettle jacket umbrella camera bicycle blanket clock mirror
    guitar notebook keyboard basket ladder hammer pillow tent scarf helmet radio"""
)
JOBS = word_list(
    """teacher doctor baker farmer pilot nurse painter driver writer gardener cook engineer sailor
    singer carpenter dentist librarian plumber"""
)
HOBBIES = word_list(
    """reading swimming chess painting hiking cycling cooking singing dancing fishing running
    gardening drawing knitting skating climbing"""
)
LANGUAGES = word_list(
    "English Spanish French German Italian Portuguese Japanese Korean Polish Dutch"
)
DAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = word_list(
    """January February March April May June July August September October November December"""
)
ROOMS = word_list("kitchen bedroom bathroom hallway garage office cellar attic garden balcony")
NOUNS = word_list(
    """invoice order parcel ticket report account guest document photo device sensor garden recipe
    room vehicle train flight playlist project task note contract budget server job license
    lesson student member library window door pump tank meter route badge folder poster
    refund visit shipment survey"""
)
VERBS = word_list(
    """get find create update delete check open close start stop book cancel list send lock reserve
    schedule track measure rename archive approve print"""
)
QUALITIES = word_list("old new big small blue red quiet fast main spare north south first second")
EMOJI = word_list("👋 🙂 🎉 🌞 🌧️ 🍎 🐱 🐶 ❤️ 👍 🚀 🌍 ✨ 🍕")
UNICODE_PHRASES = [
    "你好，世界",
    "こんにちは",
    "안녕하세요",
    "привет",
    "Γειά σου",
    "مرحبا",
    "שלום",
    "नमस्ते",
    "café crème",
    "naïve",
    "¿Qué tal?",
    "Grüße",
    "smörgåsbord",
    "3 × 4 ≠ 13",
    "π ≈ 3.14",
]

_ONSETS = word_list("b br c d dr f g gr h j k l m n p r s sh st t tr v w z")
_VOWELS = word_list("a e i o u ai ee ia")
_CODAS = ["", "n", "r", "l", "s", "m", "nd", "rt", "x"]


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that is in no list, so that copying cannot be memory."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((2, 2, 3)))
    )


def person(rng: random.Random) -> str:
    """A first name, at times invented, at times with a surname."""
    first = made_up_word(rng).capitalize() if rng.random() < 0.12 else rng.choice(NAMES)
    return f"{first} {rng.choice(SURNAMES)}" if rng.random() < 0.2 else first


def city(rng: random.Random) -> str:
    """A real city, at times an invented one."""
    return made_up_word(rng).capitalize() if rng.random() < 0.1 else rng.choice(CITIES)


def code(rng: random.Random) -> str:
    """An identifier such as `KX-4821`."""
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(rng.choice((1, 2, 3))))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choice((2, 3, 4, 5))))
    return letters + rng.choice(("-", "", "_")) + digits


def date(rng: random.Random) -> str:
    """An ISO date."""
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock_time(rng: random.Random) -> str:
    """A time of day such as `07:30`."""
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def with_article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
