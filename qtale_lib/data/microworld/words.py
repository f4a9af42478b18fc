# ruff: noqa: SIM905 (word lists read better as text)
"""The words of the embedded world: names, values and rule outcomes, as plain data.

Every word is one token of the embedded model's word-level tokenizer. Values of one attribute are all single
words, so no choice is longer than another; names are two words, drawn from two lists, so that a thousand
entities need only a hundred tokens.
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

TOWN_FIRST = """
    North South East West Old New Upper Lower Great Little High Long Saint Fort Port Mount Inner Outer
    Middle Far Near Deep Fair Broad
""".split()
TOWN_SECOND = """
    Velm Tarn Orlo Brask Quill Sember Dunmore Astry Pellan Hox Irwell Kestle Lorne Mirren Nessa Oakham
    Pindar Rothe Selby Thorn Ulver Vance Wick Yarrow Zell Aldery Corbin Dray Elmet Garth
""".split()

ANIMAL_FIRST = """
    striped spotted crested horned maned bearded tufted ringed masked hooded banded dwarf giant swift
    woolly spiny marbled pied lesser greater common royal silent rusty
""".split()
ANIMAL_SECOND = """
    marmot gecko ibex tapir lemur civet stoat quail plover shrew vole badger newt toad lizard beetle moth
    hare lynx bison crake ferret jackal kestrel
""".split()

THING_FIRST = """
    carved painted polished antique narrow wide round square hollow heavy light tall short plain fancy
    curved folded striking simple sturdy slender ornate dented patched
""".split()
THING_SECOND = """
    bowl box cup frame stool shelf tray vase spoon ladle hook latch bucket jug basket bench chest comb
    dish handle lamp mask panel plate rod screen shield sign tile wheel
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
TEMPERS = "calm proud shy bold gentle stern".split()

REGIONS = "Arden Borland Casta Dorvia Estmark Feldia Gorvan Hestia".split()
CLIMATES = "mild humid arid stormy frosty foggy sunny windy".split()
EXPORTS = "salt wool copper timber silk paper honey coal".split()

FOODS = "seeds roots insects grass fish leaves nuts bark".split()
HABITATS = "forest desert swamp meadow cliff cave river tundra".split()
COLOURS = "brown grey white black red yellow golden silver".split()

MATERIALS = """
    glass iron clay pine wax wicker marble brass ice cloth rubber bone
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
}

# Each goal of the physical world and the four tools among which the material decides.
PHYSICAL_GOALS = {
    "cut": ("saw", "knife", "chisel", "wire"),
    "clean": ("brush", "sponge", "cloth", "sand"),
    "mend": ("glue", "solder", "thread", "putty"),
    "mark": ("pencil", "needle", "chalk", "stamp"),
    "move": ("cart", "sling", "rope", "pole"),
    "store": ("crate", "rack", "sack", "cellar"),
}
