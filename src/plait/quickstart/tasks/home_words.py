"""What a household is called in each language: entity names, rooms, and what makes a good sentence.

The templates leave names and rooms to the household, and are lenient, since they are made for
recognising speech: they also accept what nobody would say. `rules` replaces lenient expansion rules
by ones to speak with, `reject` is a pattern of what is left over.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    """The household in one language.

    `names` maps a domain to entity names; a name may carry its articles, "die|Stehlampe", which are
    then the only ones that may stand before it. `areas` maps what is said to the room's name.
    """

    names: dict[str, tuple[str, ...]]
    areas: tuple[str, ...]
    items: tuple[str, ...]
    places: tuple[str, ...]
    area_phrases: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    reject: str = r"(?!)"


ENGLISH = Words(
    names={
        "light": (
            *("desk lamp", "floor lamp", "reading", "bedside", "ceiling light", "fairy lights"),
            *("mirror", "chandelier", "night light", "porch", "counter", "fireplace"),
        ),
        "switch": ("coffee machine", "kettle", "dehumidifier", "printer", "pond pump", "heater"),
        "fan": ("ceiling fan", "tower fan", "extractor fan", "window fan"),
        "cover": ("roller blind", "awning", "garage door", "skylight", "velvet curtain"),
        "media_player": ("radio", "television", "record player", "kitchen speaker", "soundbar"),
        "vacuum": ("Robbie", "dust devil", "Mister Sweep", "hoover"),
        "weather": (),
    },
    areas=(
        *("kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "nursery"),
        *("garage", "attic", "cellar", "dining room", "guest room", "conservatory", "laundry"),
    ),
    items=(
        *("milk", "oat flakes", "two lemons", "brown bread", "washing powder", "batteries"),
        *("olive oil", "a dozen eggs", "carrots", "cat food", "dark chocolate", "tea bags"),
        *("baking soda", "red onions", "light bulbs", "mustard"),
    ),
    places=("Leeds", "Lisbon", "Chicago", "Oslo", "Galway", "Kyoto"),
    rules={
        "all": "all [the]",
        "turn": "(turn|switch)",
        "in": "in",
        "numeric_value_set": "(set|change|turn)",
        "close": "(close|shut|lower)",
        "open": "(open|raise)",
        "light": "(light|lights)",
    },
    reject=(
        r"(light|lights|lamp) (light|lights|lamp)|\b(a|an) timer for|\ban \d|\bchange (up|down)"
        r"|for \d+[ -](second|minute|hour)\b|\b(the|my|our) (the|my|our)|\bmake the color"
        r"|\ball (the )?(\w+ )?(fan|light)\b|\d[ -](minutes|hours) timer|\d% the\b"
    ),
)

GERMAN = Words(
    names={
        "light": (
            *("die|Stehlampe", "die|Leselampe", "die|Schreibtischlampe", "das|Deckenlicht"),
            *("der|Kronleuchter", "die|Lichterkette", "das|Nachtlicht", "die|Spiegelleuchte"),
            *("der|Fluter", "die|Pendelleuchte"),
        ),
        "switch": (
            *("die|Kaffeemaschine", "der|Wasserkocher", "der|Entfeuchter", "der|Drucker"),
            *("die|Teichpumpe", "das|Heizkissen"),
        ),
        "fan": ("der|Deckenventilator", "der|Turmventilator", "die|Abluft", "der|Fensterlüfter"),
        "cover": ("das|Rollo", "die|Markise", "das|Garagentor", "das|Dachfenster", "der|Vorhang"),
        "media_player": (
            *("das|Radio", "der|Fernseher", "der|Plattenspieler", "die|Soundbar"),
            "der|Küchenlautsprecher",
        ),
        "vacuum": ("der|Robbi", "der|Staubteufel", "die|Saugfee", "der|Krümelfresser"),
        "weather": (),
    },
    areas=(
        *("Küche", "Wohnzimmer", "Schlafzimmer", "Bad", "Flur", "Büro", "Kinderzimmer", "Garage"),
        *("Keller", "Esszimmer", "Gästezimmer", "Wintergarten", "Waschküche", "Diele"),
    ),
    items=(
        *("Milch", "Haferflocken", "zwei Zitronen", "Vollkornbrot", "Waschpulver", "Batterien"),
        *("Olivenöl", "ein Dutzend Eier", "Möhren", "Katzenfutter", "Zartbitterschokolade"),
        *("Teebeutel", "Backpulver", "rote Zwiebeln", "Glühbirnen", "Senf"),
    ),
    places=("Leipzig", "Lissabon", "Graz", "Oslo", "Basel", "Kyoto"),
    area_phrases={
        **{f"in der {room}": room for room in ("Küche", "Garage", "Waschküche", "Diele")},
        **{
            f"im {room}": room
            for room in (
                *("Wohnzimmer", "Schlafzimmer", "Bad", "Flur", "Büro", "Kinderzimmer", "Keller"),
                *("Esszimmer", "Gästezimmer", "Wintergarten"),
            )
        },
    },
    rules={
        "area": "{area_phrase:area}",
        "alle": "alle",
        "alle_genitiv": "alle",
        "lichter": "[die ](Lichter|Lampen|Leuchten)",
        "alle_lichter": "alle (Lichter|Lampen|Leuchten)",
        "licht": "([das ]Licht|[die ]Beleuchtung)",
        "luefter": "[den ](Ventilator|Lüfter)",
        "luefter_genitiv": "des Ventilators",
        "heizung": "([die ]Heizung|[die ]Temperatur|[das ]Thermostat)",
        "machen": "mach",
        "schalten": "schalte",
        "fahren": "fahr",
        "setze": "setz[e]",
        "setzen": "(setze|stelle)",
        "naechster": "nächste[n|s]",
        "wieviel": "wie viel",
        "schliessen": "schließ[e]",
        "media_type": "(Musik|Wiedergabe)",
        "song": "(Titel|Song)",
        "hier": "(hier|in diesem Zimmer)",
        "stt_fix_licht_an": "Licht an",
        "an": "(an|ein)",
        "aus": "aus",
        "auf": "auf",
        "zu": "zu",
    },
    reject=(
        r"\b([2-9]|\d\d+) (Stunde|Minute|Sekunde)\b|\b1 (Stunden|Minuten|Sekunden)"
        r"|\bbei(m| )|des Thermostat |(Licht|Lampe|leuchte|kette) (Licht|Lampe)|EinkaufsListe"
        r"|\bvom? (dem|die|den|das)\b|\b(die|das|den) (nächste Titel|nächste Song|min|max)\b"
        r"|(Farbe|Helligkeit|Position|Lautstärke|Geschwindigkeit) (der|die|das|dem|den) "
        r"|\b(das|dem) Roll?(l?äden|laden)|\bein (Titel|Song)|leuchten lassen|[a-zäöüß]leuchten\b"
        r"|\bam (die|das|den)\b|\b(das|mein) (Musik|Wiedergabe)|dieses Titel|nächstes Song"
        r"|\b(der|das) nächsten|zum meinem|auf volle ein\b"
        r"|\b(das|dem) (höchste|niedrigste|kleinste|geringste|volle|größte) Stufe|\bdem Tore?\b"
    ),
)
