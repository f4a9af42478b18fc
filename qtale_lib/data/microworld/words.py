# ruff: noqa: SIM905 (word lists read better as text)
"""The words of the embedded world: names, values and rule outcomes, as plain data.

Every word is one token of the embedded model's word-level tokenizer. Values of one attribute are all single
words, so no choice is longer than another; persons and things have names of two words, drawn from two lists,
so that thousands of entities need only some two hundred tokens.
"""

FIRST_NAMES = """
    Anna Ben Clara David Elsa Felix Greta Hugo Irene Jonas Karin Leo Marta Nils Olga Paul Quinn Rosa Simon
    Tilda Ulf Vera Walter Xenia Yara Zeno Adele Boris Carla Dora Emil Frida Gustav Hanna Ivan Julia Kurt
    Lena Max Nora Oscar Petra Ralf Sara Tom Ursula Viktor Wanda
""".split()
LAST_NAMES = """
    Reed Hill Stone Brook Marsh Field Wood Lake Ford Dale Frost Snow Moss Finch Swan Drake Wolfe Fox Hart
    Lamb Crane Heron Marten Otter Archer Baker Carter Dyer Farmer Gardner Hunter Mason Miller Piper Potter
    Sadler Shepherd Tanner Taylor Turner Weaver Wright Abbot Bishop Dean King Knight Page Prior Rivers
    Banks Bridges Castle Church Fields Groves Hedges Meadows Mills Parks Pools Waters Wells Woods
""".split()

TOWNS = """
    Velm Tarn Orlo Brask Quill Sember Dunmore Astry Pellan Hox Irwell Kestle Lorne Mirren Nessa Oakham
    Pindar Rothe Selby Thorn Ulver Vance Wick Yarrow Zell Aldery Corbin Dray Elmet Garth Harwick Inver
    Jessop Kelso Lunt Maldon Norby Ostrey Penrith Ravel Ashby Bexley Caldor Denholm Eskmere Farrow Gilden
    Holt Ivory Kelder Larkin Morwen Nairn Orrin Pevens Quarle Redmar Skell Tolbeth Umber Varne Whitby
    Yelland Zorin Arbroth Blythe Corvan Dunster Emberly Fenwick Glanmor Hestle Ilmar Jarrow Kendal Lydden
    Milver Norwen Ostend Pryde
""".split()

ANIMALS = """
    marmot gecko ibex tapir lemur civet stoat quail plover shrew vole badger newt toad lizard beetle moth
    hare lynx bison crake ferret jackal kestrel otterling weasel walrus iguana cobra tortoise magpie
    raven hornet cricket salmon trout sturgeon squirrel hedgehog antelope bear wolf lion tiger panda koala
    camel llama goose pigeon sparrow falcon eagle pelican parrot peacock turkey rabbit hamster gorilla baboon
    giraffe zebra rhino hippo moose reindeer bat mole weevil spider locust mantis squid lobster crab herring
    eel carp puffin
""".split()

THING_FIRST = """
    carved painted lacquered antique narrow wide round square hollow heavy light tall short plain fancy
    curved folded striking simple sturdy slender ornate dented patched oval angular thick thin shallow
    deep crooked straight smooth rough glossy matt tiny large stamped lined hinged padded notched tilted
    tapered fluted ribbed worn
""".split()
THING_SECOND = """
    bowl box cup frame stool shelf tray vase spoon ladle hook latch bucket jug basket bench chest comb
    dish handle lamp mask panel plate rod screen shield sign tile wheel buckle button coffer candlestick
    figurine funnel goblet hanger hatch lever pedestal pitcher plaque plug bangle roller stand whistle
""".split()

TRADES = """
    carpenter blacksmith teacher doctor sailor cook painter lawyer printer tailor butcher florist pilot
    nurse barber clerk
""".split()
FRUITS = """
    plums pears figs grapes cherries lemons apples melons dates quinces peaches limes berries olives
    oranges apricots
""".split()
INSTRUMENTS = """
    flute violin drum harp trumpet cello guitar piano oboe banjo lute horn organ fiddle viola bassoon
""".split()
TEMPERS = "calm proud shy bold gentle stern cheerful lazy honest greedy patient nervous".split()

REGIONS = "Arden Borland Casta Dorvia Estmark Feldia Gorvan Hestia".split()
CLIMATES = "mild humid arid stormy frosty foggy sunny windy".split()
EXPORTS = "salt wool copper timber silk paper honey coal".split()
RIVERS = "Ister Lugo Mavra Neth Orva Pesk Sarn Tiber".split()
LANDMARKS = "tower bridge abbey lighthouse windmill fortress well library".split()
FEASTS = "spring summer autumn winter harvest midnight sunrise solstice".split()
DISHES = "soup dumplings pancakes stew porridge noodles pie custard".split()

FOODS = "seeds roots insects grass fish leaves nuts bark".split()
HABITATS = "forest desert swamp meadow cliff cave lagoon tundra".split()
COLOURS = "brown grey white black red yellow golden silver".split()
SOUNDS = "howl purr hiss chirp roar growl hum click".split()
SHELTERS = "burrow nest den lair web shell thicket mound".split()
GAITS = "hops crawls trots glides waddles climbs swims gallops".split()
FEARS = "thunder fire snakes noise dogs darkness rain crowds".split()

MATERIALS = """
    glass iron clay pine wax wicker marble brass ice felt rubber bone steel cork slate linen leather granite
    amber plaster velvet tin jade oak
""".split()
MAKERS = "guild monk widow smith soldier hermit captain baron".split()

FEELINGS = "happy angry sad afraid jealous relieved".split()
SOCIAL_EVENTS = (
    "won the race",
    "lost the game",
    "missed the boat",
    "got a letter",
    "broke a plate",
    "heard a joke",
    "met a stranger",
    "found a coin",
    "saw a storm",
    "forgot a song",
    "gave a speech",
    "lost a ring",
)

# Each event of the physical world and its four outcomes (past tense: "the bowl was heated and it cracked").
PHYSICAL_EVENTS = {
    "heated": ("cracked", "softened", "glowed", "burned"),
    "dropped": ("broke", "bounced", "bent", "split"),
    "soaked": ("dissolved", "swelled", "rusted", "sank"),
    "frozen": ("stiffened", "shrank", "whitened", "snapped"),
    "polished": ("shone", "squeaked", "flaked", "dulled"),
    "struck": ("rang", "chipped", "dimpled", "thudded"),
    "squeezed": ("bent", "cracked", "squeaked", "shrank"),
    "stretched": ("snapped", "softened", "split", "whitened"),
    "buried": ("rusted", "swelled", "dulled", "stiffened"),
}

# Each goal of the physical world and the four tools among which the material decides.
PHYSICAL_GOALS = {
    "cut": ("saw", "knife", "chisel", "wire"),
    "clean": ("brush", "sponge", "cloth", "sand"),
    "mend": ("glue", "solder", "thread", "putty"),
    "mark": ("pencil", "needle", "chalk", "stamp"),
    "move": ("cart", "sling", "rope", "pole"),
    "store": ("crate", "rack", "sack", "cellar"),
    "lift": ("pulley", "rope", "winch", "jack"),
    "dry": ("towel", "stove", "sand", "rack"),
    "wrap": ("foil", "cloth", "sack", "straw"),
}

# What half of the materials, or of the tempers, do: verb -> the scene in which it is asked.
PHYSICAL_TRAITS = {
    "float": "The {name} fell into the lake.",
    "burn": "The {name} lay near the fire.",
    "rust": "The {name} stood in the rain.",
    "bend": "{guest} sat on the {name}.",
    "echo": "{guest} knocked on the {name}.",
    "melt": "The {name} lay in the sun.",
}
SOCIAL_TRAITS = {
    "forgive": "{guest} lied to {name}.",
    "smile": "{guest} waved to {name}.",
    "argue": "{guest} asked {name} for money.",
    "wait": "{guest} came late to {name}.",
    "dance": "{guest} sang for {name}.",
    "help": "{guest} fell in front of {name}.",
}
