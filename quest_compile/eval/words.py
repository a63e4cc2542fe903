"""Words for needles and word counting: enough different ones for any context."""

from __future__ import annotations

import random

ADJECTIVES = """
able amber ancient bitter blue bold brave brief bright broad broken calm careful cheap clean clear
clever cold common cool crisp curious damp dark deep distant double dry dull eager early easy empty
even exact faint fair famous fast fierce final fine firm flat fond formal fresh full gentle giant
glad golden grand gray green happy hard heavy hidden high hollow honest huge humble icy idle keen
kind large late lean light little lively lone long loud loyal lucky main merry mild modest narrow
neat new noble odd old open pale plain polite proud pure quick quiet rapid rare ready red rich ripe
rough round royal rusty safe sharp short shy silent silver simple slim slow small smooth soft solid
sour spare steady stiff strange strong sudden sunny sweet swift tall tame tender thick thin tidy
tiny tough true vast velvet vivid warm weary wide wild wise wooden young
""".split()

NOUNS = """
acorn anchor apple arrow badge baker barrel basket beacon bell berry bishop blanket boat bottle
bridge bucket butter button cabin candle canyon captain carpet castle cedar chair cherry circle
clock cloud coast collar comet copper coral corner cotton cradle crane cricket crown curtain daisy
desert diamond doctor dragon drum eagle engine falcon farmer feather fence ferry field finger flute
forest fountain fox garden gate glacier glove goose grape hammer harbor harp hawk hedge helmet
heron hill honey horse island ivory jacket jewel journal judge jungle kettle kitchen ladder lake
lantern laurel leaf lemon letter lion lizard magnet maple marble market meadow melon mirror mitten
moon mountain needle nest oak ocean olive orchard otter owl paddle palace parrot peach pearl pebble
pepper piano pigeon pillow pilot pine planet plum pocket pond porch potato puzzle rabbit raven
ribbon river robin rocket saddle sailor salmon sandal scarf school shadow shell shield signal skate
sparrow spider spoon station stone storm stream sugar table tailor temple thimble thunder tiger
timber tower trumpet tulip tunnel turtle valley village violin wagon walnut whale wheel willow
window winter wizard wolf yarn
""".split()


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """``count`` different ones: single words first, then pairs of adjective and noun.

    Raises:
        ValueError: there are not that many.
    """
    single = [*ADJECTIVES, *NOUNS]
    rng.shuffle(single)
    return single[:count] + distinct_pairs(rng, max(0, count - len(single)))


def distinct_pairs(rng: random.Random, count: int) -> list[str]:
    """``count`` different pairs such as "gentle-otter".

    Raises:
        ValueError: there are not that many.
    """
    most = len(ADJECTIVES) * len(NOUNS)
    if count > most:
        raise ValueError(f"{count} different word pairs are needed, there are {most}")
    numbers = rng.sample(range(most), count)
    return [f"{ADJECTIVES[n % len(ADJECTIVES)]}-{NOUNS[n // len(ADJECTIVES)]}" for n in numbers]
