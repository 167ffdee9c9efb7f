"""Words that are printed in pictures: everyday English ones of three to five letters, and invented ones to train on."""

from __future__ import annotations

from functools import cache

from flashsloth.data.sight.dice import Dice, split_of

_EVERYDAY = """
ant ape arm art ash axe bag ball band bank barn base bat bath bay beach bead beam bean bear bed bee beet bell belt bench
berry bib bike bird blade block boat body bolt bone book boot bow bowl box brain brake bread brick bride broom brush
bucket bud bug bulb bull bus bush cab cabin cable cage cake calf camel camp can candy cane canoe cap cape car card cart
case cash cat cave cell chain chair chalk chart check chef chess chest chick child chin chip city clam claw clay cliff
clock cloth cloud clown club coach coal coast coat cobra code coin color comb cone cook coral cord cork corn cow crab
crane crow crown cub cube cup curb curl curve dam dance dart data date dawn day deer desk dice dime dish dock doctor dog
doll dome door dot dough dove dress drill drop drum duck dune dust eagle ear earth east echo edge eel egg elbow elk
elm engine evening exit eye face fact fair fan farm fawn feast fence fern field fig film fin fire fish fist flag flame
flask fleet flock floor flour flute fly foam fog foil food foot forest fork fort fox frame frog frost fruit fuel game
garden gate gem ghost giant gift girl glass globe glove glue goat gold golf goose gown grain grape grass green grid
grill guest guide gull gym hail hair hall ham hand harp hat hawk hay head heart heel hen herb herd hill hinge hive hood
hook hoop horn horse hose hotel house hut ice igloo inch ink iris iron island ivory ivy jacket jam jar jaw jeans jelly
jet jewel joke judge juice jump jury kayak key king kite kiwi knee knife knot koala lab lace lady lake lamb lamp land
lane laser lava lawn leaf leek leg lemon lens level lid light lilac lily lime line lion lip list lizard llama lock loft
log loom loop lunch lung maid mail map maple march mask mast mat maze meal meat medal melon menu metal mile milk mill
mint mist mole money month moon moose moss moth motor mouse mouth movie mud mug music nail name navy neck needle nest
net news night node noon north nose note novel nut oak oar oat ocean olive onion opera orbit otter oven owl paint pair
palm pan panda panel pants paper park party pasta path paw pea peach pear pearl pedal pen perch piano pie pig pilot pin
pine pipe pit pizza plane plant plate plow plug plum poem point pole polo pond pony pool port post pot pouch prism
prize pulp pump puppy purse queen quill quilt quiz rabbit race radar radio raft rail rain ramp ranch rat raven razor
reef ribs rice ring river road robe robin robot rock rocket rod roof room root rope rose ruby rug ruler sail salad
salt sand sauce saw scale scarf school score scout screw sea seal seat seed shade shark sheep shelf shell ship shirt
shoe shop shore sign silk silver sink site skate ski skirt sky slate sled sleep sleet sloth smile smoke snack snail
snake snow soap sock soda sofa soil song soup south space spade spark spear spice spoon sport spot spring spy stable
stage stair stamp star steam steel stem step stick stone stool store storm stove straw street suit sun swan sweet
swing sword table tail tape tart taxi tea team tent text thorn thumb tide tie tiger tile tin tire toad toast toe tool
tooth torch tour towel tower town toy track trail train tray tree truck trunk tube tulip tuna tunnel turf twig uncle
valley van vase vault vent vest video villa vine viola visit voice wagon waist wall wand wasp watch water wave wax web
well west whale wheat wheel whip wig wind window wing wire wolf wood wool word world worm wrist yard yarn year yolk
zebra zero zone zoo able acid add age agree alarm also angle apple april argue arrow asset badge basic begin below big
black blank blend bless blue boil bold borrow both brave brief bright bring broad brown build busy call calm carry
catch cause cheap cheer clean clear climb close cold come cool copy count cover crisp cross cut damp dark deal deep
deny draw dream drink drive dry early eat eight elder empty enjoy enter equal even every exact extra fade faint false
far fast feel few fifty fill find first fit five fix flat float focus fold form four free fresh front full fun funny
gain give glad glow good gray great grow half happy hard have hear help hero hide high hold home hop hope hot huge
hum hurry idea inner issue item join just keen keep kick kind knit know large last late laugh lead lean learn left lend
light limit listen live local long look lost loud love low lucky main make many mark meet merry minor mix more most
move near neat need nest never new nice nine noble noisy odd offer often old one open order other out over own pack
part pass pay pick place plain play plus pour press print proud pull pure push put quick quiet quite race raise rapid
rare reach read ready real relax rent reply rest rich ride right rise rough round royal rule run safe same save say
see sell send serve seven shape share sharp shine short shout show shut sick sing sit six size skip slow small smart
smell soft solid solve some soon sort spell spend spin split stand start stay still stir sunny super sure swim take
talk tall taste teach tell ten thank thick thin think three throw tidy tight time tiny today top touch trade true trust
try turn twin two under unite until upper use usual vast very view vivid vote wait walk want warm wash wear week wet
white whole wide wild win wipe wise wish wonder work wrap write yes young yummy zip
"""

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"


@cache
def words_of(split: str) -> tuple[str, ...]:
    """The everyday words of a split, each of three to five letters, in alphabetical order."""
    chosen = {word for word in _EVERYDAY.split() if 3 <= len(word) <= 5 and split_of(f"word/{word}") == split}
    return tuple(sorted(chosen))


def draw_word(dice: Dice, split: str) -> str:
    """A word of the split. Every second one of training is invented: a few hundred everyday words could be learnt by
    heart as pictures, and a reader of letters is what validation and test, with other words, ask for."""
    if split != "train" or dice.coin():
        return dice.choice(words_of(split))
    while True:
        # Letters follow each other freely in half of them, so that no pair of letters is new at the test.
        length = dice.integer(3, 5)
        if dice.coin():
            word = "".join(dice.choice(CONSONANTS + VOWELS) for _ in range(length))
        else:
            start = dice.integer(0, 1)
            word = "".join(dice.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
        if split_of(f"word/{word}") == "train":
            return word
