"""The vocabulary of the synthetic tasks."""

# ruff: noqa: SIM905 - a list of quoted words would be three times as long

ADJECTIVES = (
    "amber ancient arctic autumn bitter blue bold brave bright broken bronze calm clever cloudy coastal cold copper "
    "coral crimson crystal curious dark deep distant double dry dusty early eager eastern empty fading fallen "
    "famous fierce final fine flat foggy forest free frosty gentle golden grand gray green happy hazel heavy hidden "
    "hollow humble icy iron ivory jolly kind large late lively lonely long lucky marble mellow misty modest mossy "
    "narrow noble northern old orange pale patient plain polar proud purple quick quiet rapid rare red ripe rough "
    "royal rustic sacred salty scarlet secret shady sharp shiny silent silver simple sleepy small smooth snowy soft "
    "solar solid southern spring steady stone stormy summer sunny sweet swift tall tiny velvet violet warm western "
    "white wild windy winter wise wooden yellow young"
).split()

NOUNS = (
    "anchor apple arrow badger bakery barrel basin basket beacon bear bell bench bird blossom boat bottle branch "
    "breeze bridge brook bucket butter cabin camel candle canyon castle cedar cherry circle cliff clock cloud comet "
    "compass cottage creek cricket crown desert dolphin dragon drum eagle engine falcon farm feather fern field "
    "finch flame flower forest fountain fox galaxy garden gate glacier goose grove hammer harbor harvest hawk heron "
    "hill horizon horse island jacket jungle kettle kite ladder lagoon lake lantern leaf lemon lion lizard maple "
    "market meadow mill mirror monkey moon moose mountain museum needle ocean olive orchard otter owl palace panda "
    "paper parrot path peach pebble pencil pepper phoenix piano pigeon pilot pine planet pond prairie rabbit rain "
    "raven reef ribbon river robin rocket rose saddle sail salmon school shadow sheep shell ship sparrow spider "
    "spoon squirrel stable star station storm stream sunset swan table temple thunder tiger tower train tree tulip "
    "tunnel turtle valley village wagon walnut water whale wheel willow window wolf wren zebra"
).split()

ATTRIBUTES = (
    "access code,magic number,locker number,serial number,badge number,gate code,account number,ticket number,"
    "phone extension,batch number,order number,safe combination,parcel number,license number,reference number,"
    "room key,pass phrase,code name,call sign,secret word,storage label,radio channel,member number,invoice number,"
    "bank pin,flight number,hall number,door key"
).split(",")

ORDINALS = ("first", "second", "third", "fourth")
