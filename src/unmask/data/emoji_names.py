"""Which emoji a drawing shows: names to codepoints for `unmask.data.emoji`.

Three of the seven sets say which codepoints each drawing stands for. The others have names alone, in the
words of several CLDR versions, or their own.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass

_REGIONAL = range(0x1F1E6, 0x1F200)
# Man, woman and person (and so on by age) are the same drawing but for hair: one concept.
_SAME_CONCEPT = {
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1,  # man, woman -> person
    0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2,  # boy, girl -> child
    0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,  # old man, old woman -> older person
    0x1F46B: 0x1F46D, 0x1F46C: 0x1F46D,  # couples holding hands
    0x1F385: 0x1F936,  # Santa Claus, Mrs. Claus
}  # fmt: skip
# Labels that later CLDR versions changed; the two old sets still use them.
_OLD_NAMES = {
    "exclamation-mark": "2757", "question-mark": "2753", "pound-symbol": "0023-20e3",
    "a-button": "1f170", "b-button": "1f171", "ab-button": "1f18e", "o-button": "1f17e",
    "up-text-button": "1f199", "heavy-heart-exclamation": "2763", "man-with-chinese-cap": "1f472",
    "blond-haired-person": "1f471", "smiling-cat-face-with-heart-eyes": "1f63b",
    "flag-for-cocos-islands": "1f1e8-1f1e8", "flag-for-macau-sar-china": "1f1f2-1f1f4",
    "flag-for-macedonia": "1f1f2-1f1f0", "flag-for-myanmar": "1f1f2-1f1f2",
    "flag-for-swaziland": "1f1f8-1f1ff", "flag-for-turkey": "1f1f9-1f1f7",
    "flag-for-black-flag": "1f3f4", "flag-for-white-flag": "1f3f3", "flag-for-chequered-flag": "1f3c1",
    "flag-for-crossed-flags": "1f38c", "flag-for-rainbow-flag": "1f3f3-200d-1f308",
    "flag-for-triangular-flag": "1f6a9",
}  # fmt: skip
# Seen by eye and put right, by set: "slug label", or "slug" alone for a drawing that is not what its name
# says (a revolver named "water pistol"), or that lost its colours. FxEmoji's names are its own.
_CORRECTIONS = {
    "noto-v1": "pistol",
    "emojione": "pistol",
    "fxemoji": """
2hearts two hearts|americasglobe globe showing americas|anguish anguished face
anticlockwiseupwardsanddownwardsarrows counterclockwise arrows button|aok ok hand
arrowrightwardsdownwards right arrow curving down|arrowrightwardsupwards right arrow curving up
asiaaustraliaglobe globe showing asia-australia|backwithleftwardsarrow back arrow
banknotedollar dollar banknote|banknoteeuro euro banknote|banknotepound pound banknote
banknoteyen yen banknote|bellcancellation bell with slash|blackdownpointingdoublearrow fast down button
blackleftpointingarrow reverse button|blackleftpointingdoublearrow fast reverse button
blackrightpointingarrow play button|blackrightpointingdoublearrow fast-forward button
blackskullcrossbones skull and crossbones|blackuppointingdoublearrow fast up button
blonde person: blond hair|bolt high voltage|bookmarktab bookmark tabs|bow ribbon|bowing person bowing
bunny rabbit face|bunny-ears people with bunny ears|bunnyside rabbit|cat cat face|catside cat
cellphone mobile phone|chartdownwardstrend chart decreasing|chartupwardstrend chart increasing
chartupwardstrendyen chart increasing with yen|chilipepper hot pepper|chineseflag flag: china
cjkunifiedideograph-a japanese reserved button|cjkunifiedideograph-b japanese open for business button
cjkunifiedideograph-c japanese prohibited button|cjkunifiedideograph-d japanese vacancy button
cjkunifiedideograph-e japanese passing grade button|cjkunifiedideograph-f japanese no vacancy button
cjkunifiedideograph-g japanese not free of charge button
cjkunifiedideograph-h japanese monthly amount button|cjkunifiedideograph-i japanese free of charge button
cjkunifiedideograph-j japanese application button|cjkunifiedideograph-k japanese discount button
clock12oclock twelve o'clock|clock12thirty twelve-thirty|clock1oclock one o'clock|clock1thirty one-thirty
clock2oclock two o'clock|clock2thirty two-thirty|clock3oclock three o'clock|clock3thirty three-thirty
clock4oclock four o'clock|clock4thirty four-thirty|clock5thirty five-thirty|clock6oclock six o'clock
clock6thirty six-thirty|clock7oclock seven o'clock|clockwisedownupcircledarrows clockwise vertical arrows
clockwiserightwardsleftwardscirclearrows repeat button
clockwiserightwardsleftwardscirclearrowsone repeat single button
closedmailboxlowered closed mailbox with lowered flag|closedmailboxraised closed mailbox with raised flag
confetti confetti ball|construct construction worker|construction building construction
constructionsign construction|contact bust in silhouette|contact2 busts in silhouette
controlknob control knobs|couple couple with heart|couplekiss kiss|crying crying face
darksunglasses sunglasses|devilhorns smiling face with horns|diamondshapewithdotinside diamond with a dot
dissapointedrelief sad but relieved face|dog dog face|dogside dog
doubleexclaimationmark double exclamation mark|down backhand index pointing down
downpointingsmallredtrisngle downwards button|dragonhead dragon face|dragonside dragon
eightspokedasterix eight-spoked asterisk|endwithleftwardsarrow end arrow
envelopedownarrowabove envelope with arrow|europeafricaglobe globe showing europe-africa
evergreen evergreen tree|exclaimationquestionmark exclamation question mark|fallingleaf fallen leaf
fishcakeswirl fish cake with swirl|fistedhand oncoming fist|flexbicep flexed biceps|floppydisk2 floppy disk
forkknife fork and knife with plate|franceflag flag: france|frontfacingchick front-facing baby chick
frown person frowning|frownmouth frowning face with open mouth|girlgirl women holding hands
girlguy woman and man holding hands|gma old woman|gpa old man|greatbritainflag flag: united kingdom
grin grinning face|grineyes beaming face with smiling eyes|grinsquint grinning squinting face
grinsweat grinning face with sweat|grintears face with tears of joy|grinwide grinning face with big eyes
grinwideeyes grinning face with smiling eyes|guapimao person with skullcap|guyguy men holding hands
hampster hamster|hand raised hand|hands open hands|handup person raising hand
headmassage person getting massage|heartarrow heart with arrow|heartgreen green heart
heartpurple purple heart|heartribbon heart with ribbon|heartyellow yellow heart
heavymultiplicationsymbol multiply|heels high-heeled shoe|high5 raising hands
highspeedtrainbulletnose bullet train|index index pointing up|italianflag flag: italy
japaneseangrymask goblin|japanflag flag: japan|keyboard|kiss kissing face
kissclosedeyes kissing face with closed eyes|kisseyes kissing face with smiling eyes
kissing face blowing a kiss|koreaflag flag: south korea|leaffluttering leaf fluttering in wind
left backhand index pointing left|leftmagnifyingglass magnifying glass tilted left
leftwritinghand writing hand|leopardside leopard|lockandkey locked with key|loudlycrying loudly crying face
lowerleftpen pen|makeupbag clutch bag|manltepiececlock mantelpiece clock|mansshirt t-shirt
mensrunner running shoe|mensshoe man's shoe|meridianglobe globe with meridians
monkeyhear hear-no-evil monkey|monkeysee see-no-evil monkey|monkeyspeak speak-no-evil monkey
mouse mouse face|mouseside mouse|negativesquaredlatincaptiala a button (blood type)
negativesquaredlatincaptialb b button (blood type)|negativesquaredlatincaptialo o button (blood type)
nogesture person gesturing no|nooneunder18symbol no one under eighteen
notebookdecorativecover notebook with decorative cover|okgesture person gesturing ok
oldpersonalcomputer laptop|onarrowleftright on! arrow|openmailboxlowered open mailbox with lowered flag
openmailboxraised open mailbox with raised flag|outbox outbox tray|perservere persevering face
personalcomputer|phonerightarrowleft mobile phone with arrow|pig pig face|pigside pig|pigsnout pig nose
pinkwallet purse|pistol|poo pile of poo|potablewatersystem potable water|pout person pouting
pouting enraged face|present wrapped gift|racecar racing car|raincloud cloud with rain
raisedhandpartfingers vulcan salute|raisedhandsfingerssplayed hand with fingers splayed
reminder reminder ribbon|right backhand index pointing right
rightmagnifyingglass magnifying glass tilted right|russianflag flag: russia|saggitarius sagittarius
sandals woman's sandal|screamfear face screaming in fear|silhouetteohjapan map of japan
sixpointedstarwithdot dotted six-pointed star|sleuthspy detective|smallfrown slightly frowning face
smallsmile slightly smiling face|smileeyes smiling face with smiling eyes|smiletongue face savoring food
snowcloud cloud with snow|snowmountains snow-capped mountain|soonwithrightarrow soon arrow
spanishflag flag: spain|speaker3soundwaves speaker high volume|speakercancellation muted speaker
speakeronesoundwave speaker medium volume|speechbubble speech balloon|spurtingwhale spouting whale
squaredup up! button|stormcloud cloud with lightning|studiomic studio microphone
sunglasses smiling face with sunglasses|sunraincloud sun behind rain cloud|sunrays sun
sweatsplash sweat droplets|telephonereceiver2 telephone receiver|tennisball tennis
thoughtbaloon thought balloon|tie necktie|tiger tiger face|tigerside tiger|tongueout face with tongue
topwithupwardsarrow top arrow|toykotower tokyo tower|tramcar|turban person wearing turban
up backhand index pointing up|uppointingsmallredtrisngle upwards button|videocasette videocassette
waitress person tipping hand|waningbibbousmoon waning gibbous moon|wave water wave|waving waving hand
whiteexclaimationmark white exclamation mark|whitesunsmallcloud sun behind small cloud|window
winking winking face|wiredkeyboard keyboard|womansshirt woman's clothes
""",
}


@dataclass(frozen=True)
class Emoji:
    """What Unicode says of one emoji (no skin tone)."""

    key: str  # codepoints, e.g. "1f3c3-200d-2642"
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    order: int


def codepoint_key(hexcode: str) -> str:
    """Lower-case hex of at least four digits joined by "-", without the variation selector fe0f."""
    points = [int(part, 16) for part in re.split("[-_ ]", hexcode)]
    return "-".join(f"{point:04x}" for point in points if point != 0xFE0F)


def squash(name: str) -> str:
    """A name with case, accents, spaces and punctuation taken out, so that spellings meet."""
    plain = unicodedata.normalize("NFKD", name.replace("&", " and ")).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]", "", plain.lower())


def concept_of(key: str) -> str:
    """The concept an emoji draws: its first codepoint (flags: the pair of regional indicators).

    Variants by gender, hair, direction or skin tone share it, as do man, woman and person.
    """
    points = [int(part, 16) for part in key.split("-")]
    if points[0] in _REGIONAL:
        return "-".join(f"{point:04x}" for point in points[:2])
    return f"{_SAME_CONCEPT.get(points[0], points[0]):04x}"


class Names:
    """Finds the codepoints of a drawing from its name.

    Tiers are tried in turn: CLDR label, slugs learnt from the sets that carry codepoints, shortcodes,
    Unicode character names. A name that means two emoji within one tier is left to the next.
    """

    def __init__(self, data: list[dict], groups: dict, shortcodes: dict, unicode_names: dict) -> None:
        self.emoji: dict[str, Emoji] = {}
        self.tiers: list[dict[str, set[str]]] = [defaultdict(set) for _ in range(4)]
        for entry in data:
            key = codepoint_key(entry["hexcode"])
            for each in [entry, *entry.get("skins", [])]:
                self._add(0, each["label"], codepoint_key(each["hexcode"]))
            group = groups["groups"].get(str(entry.get("group")))
            if group in (None, "component"):  # lone regional indicators, skin tones, hair
                continue
            subgroup = groups["subgroups"][str(entry["subgroup"])]
            tags = tuple(tag.lower() for tag in entry.get("tags", []))
            self.emoji[key] = Emoji(key, entry["label"].lower(), tags, group, subgroup, entry["order"])
        for hexcode, codes in shortcodes.items():
            for code in [codes] if isinstance(codes, str) else codes:
                self._add(2, code, codepoint_key(hexcode))
        for hexcode, name in unicode_names.items():
            self._add(3, name, codepoint_key(hexcode))

    def _add(self, tier: int, name: str, key: str) -> None:
        self.tiers[tier][squash(name)].add(key)

    def learn(self, chars: dict[str, str]) -> None:
        """Take the slugs of a set that carries codepoints."""
        for hexcode, slug in chars.items():
            self._add(1, slug, codepoint_key(hexcode))

    def find(self, slug: str) -> tuple[int, str] | None:
        """(rank, codepoint key) of a slug, best rank 0, or None where the name is not known."""
        spellings = [slug]
        if match := re.fullmatch(r"flag-for-(.+)", slug):
            spellings.append(f"flag-{match[1]}")
        if match := re.fullmatch(r"digit-(\w+)", slug):
            digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
            spellings.append(f"keycap-{digits.index(match[1]) if match[1] in digits else match[1]}")
        for rank, (spelling, tier) in enumerate((s, t) for s in spellings for t in self.tiers):
            keys = tier.get(squash(spelling), ())
            if len(keys) == 1:
                return rank, next(iter(keys))
        return (99, _OLD_NAMES[slug]) if slug in _OLD_NAMES else None


def corrections(set_name: str) -> dict[str, str]:
    """{icon slug: label} put right by hand for a set; an empty label leaves the drawing out."""
    lines = _CORRECTIONS.get(set_name, "").replace("\n", "|").split("|")
    return {slug: label for slug, _, label in (line.partition(" ") for line in lines) if slug}


def join(names: Names, icons: dict, chars: dict[str, str]) -> dict[str, str]:
    """{codepoint key: icon slug} of one set, skin tones and unknown drawings left out.

    Codepoints (`chars`) come first where the set carries them, then `corrections`, then an icon's own name,
    then the names of its aliases; each drawing and each emoji at most once. Icons the set hides (withdrawn)
    are not used.
    """
    drawn, aliases = icons["icons"], icons.get("aliases", {})
    corrected = corrections(icons["prefix"])
    pairs = {codepoint_key(hexcode): slug for hexcode, slug in chars.items()}
    found: list[tuple[int, int, str, str]] = []  # (kind: corrected, own name, alias; rank; key; slug)
    for slug, icon in drawn.items():
        match = names.find(corrected.get(slug, slug))
        if match and not icon.get("hidden"):
            found.append((int(slug not in corrected), *match, slug))
    for alias, entry in aliases.items():
        # An alias that only renames gives its parent a second name; one that flips is its own drawing.
        renames = len(entry) == 1
        slug = entry["parent"] if renames else alias
        match = names.find(alias)
        if match and not drawn[entry["parent"]].get("hidden") and slug not in corrected:
            found.append((1 + renames, *match, slug))
    used = set(pairs.values())
    for _, _, key, slug in sorted(found):
        if key not in pairs and slug not in used:
            pairs[key] = slug
            used.add(slug)
    return {key: slug for key, slug in pairs.items() if key in names.emoji}
