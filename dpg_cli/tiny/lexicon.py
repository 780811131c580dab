"""The words of the closed world, as plain data: a row for each concept, a column for each language.

Columns follow `LANGUAGES`. Notation: `a|b` lists English synonyms, the canonical one first; `m hund` is a noun with its
gender (m, f, n); `viejo/vieja` are the masculine and feminine forms of an adjective (one form alone serves both).
The lexicon is small on purpose: 512 tokens have to cover all five languages.
"""

from __future__ import annotations

LANGUAGES = ("en", "es", "de", "fr", "it")

Row = tuple[str, str, str, str, str]

# Nouns are chosen so that no article elides (l'homme) or changes before s + consonant (lo zio).
SUBJECTS: dict[str, Row] = {
    "boy": ("boy|lad", "m niño", "m junge", "m garçon", "m ragazzo"),
    "girl": ("girl", "f niña", "n mädchen", "f fille", "f ragazza"),
    "woman": ("woman|lady", "f mujer", "f frau", "f femme", "f donna"),
    "king": ("king", "m rey", "m könig", "m roi", "m re"),
    "queen": ("queen", "f reina", "f königin", "f reine", "f regina"),
    "dog": ("dog|hound", "m perro", "m hund", "m chien", "m cane"),
    "cat": ("cat", "m gato", "f katze", "m chat", "m gatto"),
    "horse": ("horse", "m caballo", "n pferd", "m cheval", "m cavallo"),
    "wolf": ("wolf", "m lobo", "m wolf", "m loup", "m lupo"),
    "mouse": ("mouse", "m ratón", "f maus", "f souris", "m topo"),
    "cook": ("cook|chef", "m cocinero", "m koch", "m cuisinier", "m cuoco"),
    "doctor": ("doctor", "m médico", "m arzt", "m médecin", "m medico"),
}

# German adjectives stand after a definite article in the nominative singular: the weak ending is -e for every gender.
QUALITIES: dict[str, Row] = {
    "small": ("small|little", "pequeño/pequeña", "kleine", "petit/petite", "piccolo/piccola"),
    "big": ("big|large", "grande", "große", "grand/grande", "grande"),
    "old": ("old", "viejo/vieja", "alte", "vieux/vieille", "vecchio/vecchia"),
    "happy": ("happy|merry", "feliz", "frohe", "content/contente", "felice"),
    "sad": ("sad", "triste", "traurige", "triste", "triste"),
    "tired": ("tired", "cansado/cansada", "müde", "fatigué/fatiguée", "stanco/stanca"),
    "calm": ("calm|quiet", "tranquilo/tranquila", "ruhige", "calme", "calmo/calma"),
}

BEFORE_NOUN: dict[str, frozenset[str]] = {
    "es": frozenset(),
    "de": frozenset(QUALITIES),
    "fr": frozenset({"small", "big", "old"}),
    "it": frozenset(),
}
"""Qualities whose adjective precedes the noun; the others follow it. (English, without genders, is simpler.)"""

VERBS: dict[str, Row] = {
    "buy": ("buys|is buying", "compra", "kauft", "achète", "compra"),
    "sell": ("sells|is selling", "vende", "verkauft", "vend", "vende"),
    "find": ("finds|is finding", "encuentra", "findet", "trouve", "trova"),
    "take": ("takes|is taking|grabs|is grabbing", "toma", "nimmt", "prend", "prende"),
    "hide": ("hides|is hiding", "esconde", "versteckt", "cache", "nasconde"),
    "paint": ("paints|is painting", "pinta", "malt", "peint", "dipinge"),
    "watch": ("watches|is watching|looks at|is looking at", "mira", "betrachtet", "regarde", "guarda"),
    "carry": ("carries|is carrying", "lleva", "trägt", "porte", "porta"),
    "seek": ("looks for|is looking for|seeks|is seeking", "busca", "sucht", "cherche", "cerca"),
}

OBJECTS: dict[str, Row] = {
    "book": ("book", "m libro", "n buch", "m livre", "m libro"),
    "cup": ("cup|mug", "f taza", "f tasse", "f tasse", "f tazza"),
    "flower": ("flower", "f flor", "f blume", "f fleur", "m fiore"),
    "hat": ("hat", "m sombrero", "m hut", "m chapeau", "m cappello"),
    "key": ("key", "f llave", "m schlüssel", "f clé", "f chiave"),
    "lamp": ("lamp", "f lámpara", "f lampe", "f lampe", "f lampada"),
    "letter": ("letter|note", "f carta", "m brief", "f lettre", "f lettera"),
    "map": ("map", "m mapa", "f karte", "f carte", "f mappa"),
    "ring": ("ring", "m anillo", "m ring", "f bague", "m anello"),
    "bell": ("bell", "f campana", "f glocke", "f cloche", "f campana"),
    "apple": ("apple", "f manzana", "m apfel", "f pomme", "f mela"),
}

PLACES: dict[str, Row] = {
    "garden": ("in the garden", "en el jardín", "im garten", "dans le jardin", "nel giardino"),
    "kitchen": ("in the kitchen", "en la cocina", "in der küche", "dans la cuisine", "in cucina"),
    "market": ("at the market", "en el mercado", "auf dem markt", "au marché", "al mercato"),
    "house": ("in the house", "en la casa", "im haus", "dans la maison", "in casa"),
    "forest": ("in the forest|in the woods", "en el bosque", "im wald", "dans la forêt", "nel bosco"),
    "bridge": ("on the bridge", "en el puente", "auf der brücke", "sur le pont", "sul ponte"),
    "town": ("in the town|in the city", "en la ciudad", "in der stadt", "dans la ville", "in città"),
}

TIMES: dict[str, Row] = {
    "now": ("now|right now", "ahora", "jetzt", "maintenant", "adesso"),
    "today": ("today", "hoy", "heute", "aujourd'hui", "oggi"),
    "morning": ("this morning", "esta mañana", "heute früh", "ce matin", "stamattina"),
    "evening": ("tonight|this evening", "esta noche", "heute abend", "ce soir", "stasera"),
}

# Articles by gender. German: nominative for the subject, accusative for the object.
DEFINITE: dict[str, dict[str, str]] = {
    "es": {"m": "el", "f": "la"},
    "de": {"m": "der", "f": "die", "n": "das"},
    "fr": {"m": "le", "f": "la"},
    "it": {"m": "il", "f": "la"},
}
INDEFINITE: dict[str, dict[str, str]] = {
    "es": {"m": "un", "f": "una"},
    "de": {"m": "einen", "f": "eine", "n": "ein"},
    "fr": {"m": "un", "f": "une"},
    "it": {"m": "un", "f": "una"},
}

_SVO = ("{subject} {verb} {object} {place} {time}.", "{time} {subject} {verb} {object} {place}.")
ORDERS: dict[str, tuple[str, ...]] = {
    "en": _SVO,
    "es": _SVO,
    # German keeps the finite verb second: a time phrase in front sends the subject behind the verb.
    "de": ("{subject} {verb} {time} {place} {object}.", "{time} {verb} {subject} {place} {object}."),
    "fr": _SVO,
    "it": _SVO,
}
"""Sentence frames, the canonical one first."""
