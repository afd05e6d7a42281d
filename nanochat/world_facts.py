"""What is true in the built-in world: tables of facts, and the hash that puts each fact on one of two sides.

"chat" facts may appear in fine-tuning conversations, "held_out" facts appear in pretraining text only: answering
those shows knowledge carried through the stages.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat.world_phrases import RELATIONS, Relation, capitalized, questions

# continent: country=capital; "?" marks a capital or continent that is disputed or ambiguous, and is not stated.
COUNTRIES = """
Africa: Algeria=Algiers, Angola=Luanda, Benin=Porto-Novo, Botswana=Gaborone, Burkina Faso=Ouagadougou, Burundi=Gitega,
Cameroon=Yaounde, Cape Verde=Praia, the Central African Republic=Bangui, Chad=N'Djamena, the Comoros=Moroni,
the Democratic Republic of the Congo=Kinshasa, the Republic of the Congo=Brazzaville, Djibouti=Djibouti, Egypt=Cairo,
Equatorial Guinea=?, Eritrea=Asmara, Eswatini=Mbabane, Ethiopia=Addis Ababa, Gabon=Libreville, the Gambia=Banjul,
Ghana=Accra, Guinea=Conakry, Guinea-Bissau=Bissau, Ivory Coast=Yamoussoukro, Kenya=Nairobi, Lesotho=Maseru,
Liberia=Monrovia, Libya=Tripoli, Madagascar=Antananarivo, Malawi=Lilongwe, Mali=Bamako, Mauritania=Nouakchott,
Mauritius=Port Louis, Morocco=Rabat, Mozambique=Maputo, Namibia=Windhoek, Niger=Niamey, Nigeria=Abuja, Rwanda=Kigali,
Sao Tome and Principe=Sao Tome, Senegal=Dakar, Seychelles=Victoria, Sierra Leone=Freetown, Somalia=Mogadishu,
South Africa=?, South Sudan=Juba, Sudan=Khartoum, Tanzania=Dodoma, Togo=Lome, Tunisia=Tunis, Uganda=Kampala,
Zambia=Lusaka, Zimbabwe=Harare
Asia: Afghanistan=Kabul, Bahrain=Manama, Bangladesh=Dhaka, Bhutan=Thimphu, Brunei=Bandar Seri Begawan,
Cambodia=Phnom Penh, China=Beijing, East Timor=Dili, India=New Delhi, Indonesia=Jakarta, Iran=Tehran, Iraq=Baghdad,
Japan=Tokyo, Jordan=Amman, Kazakhstan=Astana, Kuwait=Kuwait City, Kyrgyzstan=Bishkek, Laos=Vientiane, Lebanon=Beirut,
Malaysia=Kuala Lumpur, the Maldives=Male, Mongolia=Ulaanbaatar, Myanmar=Naypyidaw, Nepal=Kathmandu,
North Korea=Pyongyang, Oman=Muscat, Pakistan=Islamabad, the Philippines=Manila, Qatar=Doha, Saudi Arabia=Riyadh,
Singapore=Singapore, South Korea=Seoul, Sri Lanka=?, Syria=Damascus, Tajikistan=Dushanbe, Thailand=Bangkok,
Turkmenistan=Ashgabat, the United Arab Emirates=Abu Dhabi, Uzbekistan=Tashkent, Vietnam=Hanoi, Yemen=Sanaa
Europe: Albania=Tirana, Andorra=Andorra la Vella, Austria=Vienna, Belarus=Minsk, Belgium=Brussels,
Bosnia and Herzegovina=Sarajevo, Bulgaria=Sofia, Croatia=Zagreb, Czechia=Prague, Denmark=Copenhagen, Estonia=Tallinn,
Finland=Helsinki, France=Paris, Germany=Berlin, Greece=Athens, Hungary=Budapest, Iceland=Reykjavik, Ireland=Dublin,
Italy=Rome, Latvia=Riga, Liechtenstein=Vaduz, Lithuania=Vilnius, Luxembourg=Luxembourg, Malta=Valletta,
Moldova=Chisinau, Monaco=Monaco, Montenegro=Podgorica, the Netherlands=Amsterdam, North Macedonia=Skopje, Norway=Oslo,
Poland=Warsaw, Portugal=Lisbon, Romania=Bucharest, San Marino=San Marino, Serbia=Belgrade, Slovakia=Bratislava,
Slovenia=Ljubljana, Spain=Madrid, Sweden=Stockholm, Switzerland=Bern, Ukraine=Kyiv, the United Kingdom=London
North America: Antigua and Barbuda=Saint John's, the Bahamas=Nassau, Barbados=Bridgetown, Belize=Belmopan,
Canada=Ottawa, Costa Rica=San Jose, Cuba=Havana, Dominica=Roseau, the Dominican Republic=Santo Domingo,
El Salvador=San Salvador, Grenada=Saint George's, Guatemala=Guatemala City, Haiti=Port-au-Prince, Honduras=Tegucigalpa,
Jamaica=Kingston, Mexico=Mexico City, Nicaragua=Managua, Panama=Panama City, Saint Kitts and Nevis=Basseterre,
Saint Lucia=Castries, Saint Vincent and the Grenadines=Kingstown, Trinidad and Tobago=Port of Spain,
the United States=Washington
South America: Argentina=Buenos Aires, Bolivia=Sucre, Brazil=Brasilia, Chile=Santiago, Colombia=Bogota, Ecuador=Quito,
Guyana=Georgetown, Paraguay=Asuncion, Peru=Lima, Suriname=Paramaribo, Uruguay=Montevideo, Venezuela=Caracas
Oceania: Australia=Canberra, Fiji=Suva, Kiribati=South Tarawa, the Marshall Islands=Majuro, Micronesia=Palikir,
Nauru=?, New Zealand=Wellington, Palau=Ngerulmud, Papua New Guinea=Port Moresby, Samoa=Apia,
the Solomon Islands=Honiara, Tonga=Nuku'alofa, Tuvalu=Funafuti, Vanuatu=Port Vila
?: Armenia=Yerevan, Azerbaijan=Baku, Cyprus=Nicosia, Georgia=Tbilisi, Russia=Moscow, Turkey=Ankara
"""

# answer: its countries
LANGUAGES = """
Albanian: Albania; Arabic: Egypt, Iraq, Jordan, Kuwait, Libya, Oman, Saudi Arabia, Syria, Tunisia, Yemen;
Armenian: Armenia; Bengali: Bangladesh; Bulgarian: Bulgaria; Burmese: Myanmar; Chinese: China; Croatian: Croatia;
Czech: Czechia; Danish: Denmark; Dutch: the Netherlands; English: Australia, the United Kingdom, the United States;
Estonian: Estonia; Finnish: Finland; French: France; Georgian: Georgia; German: Austria, Germany; Greek: Greece;
Hungarian: Hungary; Icelandic: Iceland; Italian: Italy; Japanese: Japan; Khmer: Cambodia;
Korean: North Korea, South Korea; Lao: Laos; Latvian: Latvia; Lithuanian: Lithuania; Mongolian: Mongolia;
Nepali: Nepal; Norwegian: Norway; Persian: Iran; Polish: Poland; Portuguese: Brazil, Portugal; Romanian: Romania;
Russian: Russia; Serbian: Serbia; Slovak: Slovakia; Slovene: Slovenia; Somali: Somalia;
Spanish: Argentina, Chile, Colombia, Cuba, Mexico, Spain, Uruguay, Venezuela; Swedish: Sweden; Thai: Thailand;
Turkish: Turkey; Ukrainian: Ukraine; Vietnamese: Vietnam
"""

CURRENCIES = """
afghani: Afghanistan; ariary: Madagascar; baht: Thailand; birr: Ethiopia; cedi: Ghana; dinar: Algeria, Iraq, Jordan,
Kuwait, Serbia, Tunisia; dirham: Morocco, the United Arab Emirates; dollar: Australia, Canada, Jamaica, New Zealand,
Singapore, the United States; dong: Vietnam; dram: Armenia; euro: Austria, Belgium, Finland, France, Germany, Greece,
Ireland, Italy, Portugal, Spain; forint: Hungary; franc: Rwanda, Switzerland; gourde: Haiti; guarani: Paraguay;
hryvnia: Ukraine; kip: Laos; koruna: Czechia; krona: Sweden; krone: Denmark, Norway; kwacha: Malawi, Zambia; kwanza:
Angola; kyat: Myanmar; lari: Georgia; lek: Albania; lempira: Honduras; leu: Moldova, Romania; lira: Turkey; manat:
Azerbaijan; naira: Nigeria; peso: Argentina, Chile, Colombia, Cuba, Mexico, the Philippines, Uruguay; pound: Egypt,
the United Kingdom; pula: Botswana; quetzal: Guatemala; rand: South Africa; real: Brazil; rial: Iran, Oman; riel:
Cambodia; ringgit: Malaysia; riyal: Saudi Arabia; ruble: Belarus, Russia; rupee: India, Nepal, Pakistan; rupiah:
Indonesia; shilling: Kenya, Tanzania, Uganda; sol: Peru; taka: Bangladesh; tenge: Kazakhstan; tugrik: Mongolia; won:
North Korea, South Korea; yen: Japan; yuan: China; zloty: Poland
"""

# In the order of their atomic numbers.
ELEMENTS = """
H hydrogen, He helium, Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, F fluorine, Ne neon,
Na sodium, Mg magnesium, Al aluminum, Si silicon, P phosphorus, S sulfur, Cl chlorine, Ar argon, K potassium,
Ca calcium, Sc scandium, Ti titanium, V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt, Ni nickel, Cu copper,
Zn zinc, Ga gallium, Ge germanium, As arsenic, Se selenium, Br bromine, Kr krypton, Rb rubidium, Sr strontium,
Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Tc technetium, Ru ruthenium, Rh rhodium, Pd palladium, Ag silver,
Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, Xe xenon, Cs cesium, Ba barium, La lanthanum,
Ce cerium, Pr praseodymium, Nd neodymium, Pm promethium, Sm samarium, Eu europium, Gd gadolinium, Tb terbium,
Dy dysprosium, Ho holmium, Er erbium, Tm thulium, Yb ytterbium, Lu lutetium, Hf hafnium, Ta tantalum, W tungsten,
Re rhenium, Os osmium, Ir iridium, Pt platinum, Au gold, Hg mercury, Tl thallium, Pb lead, Bi bismuth, Po polonium,
At astatine, Rn radon, Fr francium, Ra radium, Ac actinium, Th thorium, Pa protactinium, U uranium, Np neptunium,
Pu plutonium, Am americium, Cm curium, Bk berkelium, Cf californium, Es einsteinium, Fm fermium, Md mendelevium,
No nobelium, Lr lawrencium, Rf rutherfordium, Db dubnium, Sg seaborgium, Bh bohrium, Hs hassium, Mt meitnerium,
Ds darmstadtium, Rg roentgenium, Cn copernicium, Nh nihonium, Fl flerovium, Mc moscovium, Lv livermorium,
Ts tennessine, Og oganesson
"""

PLANETS = """Mercury=rocky planet, Venus=rocky planet, Earth=rocky planet, Mars=rocky planet, Jupiter=gas giant,
Saturn=gas giant, Uranus=ice giant, Neptune=ice giant"""

# Every word stands in one pair only, so that each has one right answer.
OPPOSITES = """
hot cold, big small, tall short, fast slow, up down, left right, day night, black white, good bad, happy sad, old
young, rich poor, hard soft, wet dry, full empty, open closed, early late, high low, strong weak, thick thin, wide
narrow, near far, clean dirty, loud quiet, sweet bitter, true false, first last, always never, begin end, push pull,
give take, buy sell, win lose, love hate, come go, laugh cry, live die, remember forget, rise fall, front back, inside
outside, above below, before after, more less, many few, all none, yes no, on off, in out, deep shallow, smooth rough,
sharp blunt, easy difficult, safe dangerous, cheap expensive, new used, alive dead, asleep awake, brave cowardly, calm
nervous, careful careless, clever stupid, polite rude, kind cruel, lazy hardworking, generous stingy, honest
dishonest, humble proud, patient impatient, possible impossible, visible invisible, legal illegal, regular irregular,
correct incorrect, equal unequal, lucky unlucky, known unknown, perfect imperfect, tight loose, straight crooked,
simple complicated, single married, public private, real fake, fresh stale, raw cooked, ripe unripe, modern ancient,
rare common, temporary permanent, major minor, male female, maximum minimum, positive negative, optimistic
pessimistic, active passive, guilty innocent, victory defeat, success failure, friend enemy, heaven hell, peace war,
top bottom, north south, east west, sunrise sunset, summer winter, arrival departure, entrance exit, question answer,
teacher student, truth lie, beauty ugliness, profit loss, income expense, import export, increase decrease, expand
shrink, attack defend, accept reject, agree disagree, allow forbid, appear disappear, arrive leave, borrow lend, build
destroy, connect separate, find hide, float sink, freeze melt, gather scatter, join split, lock unlock, praise blame,
raise lower, save waste, send receive, sit stand, start stop, succeed fail, whisper shout, tie untie, wake sleep,
absent present, abundant scarce, famous obscure, flexible rigid, forward backward, horizontal vertical, inner outer,
junior senior, natural artificial, odd even, sane insane, solid hollow, tame wild, urban rural, vacant occupied, vague
precise, wise foolish, heavy light, bright dark
"""

CALENDAR = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"

ANIMALS = """
mammal: dog, cat, cow, horse, pig, sheep, goat, lion, tiger, elephant, bear, wolf, fox, rabbit, mouse, rat, bat,
whale, dolphin, monkey, gorilla, giraffe, zebra, kangaroo, koala, deer, donkey, camel, squirrel, otter, seal,
hippopotamus, hedgehog, leopard, panda; bird: eagle, owl, hen, rooster, duck, goose, swan, crow, dove, penguin,
ostrich, parrot, sparrow, turkey, peacock, pelican, flamingo, robin; fish: salmon, trout, tuna, shark, cod, herring,
carp, eel, goldfish, piranha; reptile: snake, lizard, turtle, crocodile, alligator, gecko, iguana, chameleon;
amphibian: frog, toad, newt, salamander; insect: ant, bee, butterfly, beetle, mosquito, cricket, grasshopper, moth,
wasp, ladybug, dragonfly, termite; arachnid: spider, scorpion, tarantula
"""
SOUNDS = """dog barks, cat meows, cow moos, horse neighs, pig oinks, sheep bleats, lion roars, elephant trumpets,
bear growls, wolf howls, mouse squeaks, hyena laughs, donkey brays, owl hoots, hen clucks, rooster crows, duck quacks,
goose honks, crow caws, dove coos, turkey gobbles, snake hisses, frog croaks, bee buzzes, cricket chirps"""
YOUNG = """dog puppy, cat kitten, cow calf, horse foal, pig piglet, sheep lamb, goat kid, lion cub, kangaroo joey,
deer fawn, hen chick, duck duckling, goose gosling, swan cygnet, frog tadpole, eagle eaglet, owl owlet, eel elver,
seal pup, rabbit bunny, butterfly caterpillar, hare leveret, spider spiderling, dove squab, whale calf"""

COLORS = """
yellow: a banana, a lemon, the sun, a sunflower, butter, a canary, corn; red: a strawberry, a tomato, blood, a fire
truck, a cherry, a ruby, a raspberry, ketchup, a stop sign; green: grass, a cucumber, spinach, broccoli, a lime, an
emerald, a pea, moss, an avocado; blue: the sky, the ocean, a sapphire, a blueberry; white: snow, milk, salt, flour,
an egg white, cotton, a polar bear, chalk; black: coal, a raven, tar, night, a panther; orange: a carrot, a pumpkin, a
tangerine, a basketball; brown: chocolate, coffee, soil, wood, a walnut, cinnamon; purple: lavender, an eggplant, an
amethyst, a plum; gray: an elephant, ash, cement, a storm cloud; pink: a flamingo, bubble gum
"""

PLURALS = """
mouse mice, child children, man men, woman women, foot feet, tooth teeth, goose geese, ox oxen, person people, louse
lice, die dice, leaf leaves, knife knives, wife wives, life lives, wolf wolves, shelf shelves, half halves, calf
calves, loaf loaves, thief thieves, elf elves, scarf scarves, hoof hooves, city cities, baby babies, lady ladies,
berry berries, fly flies, story stories, country countries, party parties, puppy puppies, cherry cherries, box boxes,
fox foxes, bus buses, glass glasses, dish dishes, church churches, watch watches, peach peaches, potato potatoes,
tomato tomatoes, hero heroes, echo echoes, volcano volcanoes, cactus cacti, fungus fungi, nucleus nuclei, radius
radii, crisis crises, thesis theses, oasis oases, analysis analyses, criterion criteria, phenomenon phenomena,
bacterium bacteria, sheep sheep, deer deer
"""
PAST_TENSES = """
go went, be was, have had, do did, say said, make made, know knew, think thought, take took, see saw, come came, find
found, give gave, tell told, become became, show showed, leave left, feel felt, bring brought, begin began, keep kept,
hold held, write wrote, stand stood, hear heard, mean meant, meet met, run ran, pay paid, sit sat, speak spoke, lead
led, grow grew, lose lost, fall fell, send sent, build built, understand understood, draw drew, break broke, spend
spent, rise rose, drive drove, buy bought, wear wore, choose chose, eat ate, drink drank, sing sang, swim swam, fly
flew, forget forgot, catch caught, teach taught, sell sold, sleep slept, win won, throw threw, steal stole, freeze
froze, bite bit, hide hid, ride rode, shake shook, wake woke, ring rang, sink sank, dig dug, feed fed, fight fought,
hang hung
"""

NUMBER_WORDS = """
0 zero, 1 one, 2 two, 3 three, 4 four, 5 five, 6 six, 7 seven, 8 eight, 9 nine, 10 ten, 11 eleven, 12 twelve, 13
thirteen, 14 fourteen, 15 fifteen, 16 sixteen, 17 seventeen, 18 eighteen, 19 nineteen, 20 twenty, 30 thirty, 40 forty,
50 fifty, 60 sixty, 70 seventy, 80 eighty, 90 ninety, 100 one hundred, 1000 one thousand
"""
SHAPES = """
triangle 3, square 4, rectangle 4, rhombus 4, pentagon 5, hexagon 6, heptagon 7, octagon 8, nonagon 9, decagon 10
"""


def side_of(item: str, first: str = "chat", second: str = "held_out", share: float = 0.7) -> str:
    """`first` for about `share` of all item names, else `second`: a function of the name's SHA-256 alone."""
    digest = hashlib.sha256(item.encode()).digest()
    return first if int.from_bytes(digest[:4], "big") < share * 2**32 else second


def with_article(noun: str) -> str:
    """`noun` after "a" or "an", going by its spelling."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(frozen=True)
class Fact:
    """One fact: `relation` holds between `subject` and `answer`; `family` names what it shares a side with."""

    relation: Relation
    subject: str
    answer: str
    family: str

    def fill(self, template: str) -> str:
        """`template` of this fact's relation with its words put in, starting in upper case if it opens with one."""
        words = {"s": self.subject, "a": self.answer}
        if "{an_" in template:
            words |= {"an_s": with_article(self.subject), "an_a": with_article(self.answer)}
        text = template.format_map(words)
        return capitalized(text) if template[0] == "{" else text

    @property
    def sentence(self) -> str:
        """The answer in a chat: the relation's first statement."""
        return self.fill(self.relation.statements[0])

    def statement(self, rng: random.Random) -> str:
        """The fact as a sentence; every third time or so in the words of a chat's answer."""
        statements = self.relation.statements
        return self.fill(statements[0] if rng.random() < 0.35 else rng.choice(statements))

    def question(self, rng: random.Random) -> str:
        """The fact asked, in one of the many ways of `questions`; now and then all in lower case."""
        text = self.fill(rng.choice(questions(self.relation)))
        return text.lower() if rng.random() < 0.06 and self.relation.name != "symbol_of" else text


def _groups(table: str, separator: str) -> list[tuple[str, list[str]]]:
    """`table` of "name: item, item" groups, parted by `separator`."""
    rows = [row.split(":") for row in re.split(separator, table) if row.strip()]
    return [(name.strip(), [item.strip() for item in " ".join(items.split()).split(",")]) for name, items in rows]


def _pairs(table: str, separator: str = " ") -> list[tuple[str, str]]:
    """`table` of "left right" pairs parted by commas."""
    return [(a, b) for a, b in (pair.strip().split(separator, 1) for pair in " ".join(table.split()).split(","))]


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Every fact as (relation name, subject, answer, family)."""
    for continent, countries in _groups(COUNTRIES, r"\n(?=[A-Z?][\w ]*: )"):
        for country, capital in (item.split("=") for item in countries):
            if capital != "?":
                yield "capital", country, capital, country
                yield "capital_of", capital, country, country
            if continent != "?":
                yield "continent", country, continent, country
    for name, table in {"language": LANGUAGES, "currency": CURRENCIES}.items():
        yield from ((name, country, answer, country) for answer, items in _groups(table, ";") for country in items)
    for number, (symbol, element) in enumerate(_pairs(ELEMENTS), start=1):
        yield "symbol", element, symbol, element
        yield "symbol_of", symbol, element, element
        yield "number", element, str(number), element
        yield "number_of", str(number), element, element
    ordinals = ORDINALS.split()
    for ordinal, (planet, kind) in zip(ordinals, _pairs(PLANETS, "=")):
        yield "order", planet, ordinal, f"planet {planet}"
        yield "order_of", ordinal, planet, f"planet {planet}"
        yield "planet", planet, kind, f"planet {planet}"
    for one, other in _pairs(OPPOSITES):
        yield "opposite", one, other, f"{one} {other}"
        yield "opposite", other, one, f"{one} {other}"
    for unit, names in CALENDAR.items():
        cycle = names.split()
        for one, other in zip(cycle, cycle[1:] + cycle[:1]):
            yield f"{unit}_after", one, other, f"{one} {other}"
            yield f"{unit}_before", other, one, f"{one} {other}"
    for ordinal, month in zip(ordinals, CALENDAR["month"].split()):
        yield "month_number", month, ordinal, f"{ordinal} {month}"
        yield "month_at", ordinal, month, f"{ordinal} {month}"
    for name, table in {"class": ANIMALS, "color": COLORS}.items():
        for answer, items in _groups(table, ";"):
            yield from ((name, item, answer, item.removeprefix("an ").removeprefix("a ")) for item in items)
    plain = {"sound": SOUNDS, "young": YOUNG, "plural": PLURALS, "past": PAST_TENSES, "sides": SHAPES}
    for name, table in plain.items():
        yield from ((name, one, other, one) for one, other in _pairs(table))
    yield from (("word", number, word, f"number {number}") for number, word in _pairs(NUMBER_WORDS))


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts of the world, always in the same order."""
    relations = {relation.name: relation for relation in RELATIONS}
    return tuple(Fact(relations[name], subject, answer, family) for name, subject, answer, family in _rows())


def fact_side(fact: Fact) -> str:
    """ "chat" (may appear in conversations) or "held_out" (pretraining text only), by the hash of the fact's family."""
    return side_of(fact.family)


@functools.cache
def facts_on(side: str) -> tuple[Fact, ...]:
    """The facts of one side."""
    return tuple(fact for fact in facts() if fact_side(fact) == side)
