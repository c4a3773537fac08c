"""A modest list of terms of pornography, with weights (ours).

Weight 1 and above: hardly used elsewhere. Below 1: also a word of medicine, education or law, which
counts nothing near a word of :data:`CONTEXT_WORDS`.
"""

from __future__ import annotations

EXPLICIT_TERMS: dict[str, float] = {
    # names of the genre
    "porn": 1, "porno": 1, "pornstar": 2, "pornstars": 2, "porn video": 2, "porn videos": 2,
    "xxx": 1, "xxx video": 2, "xxx videos": 2, "hentai": 1, "hardcore sex": 2, "sex tape": 1,
    "sex cam": 2, "sex cams": 2, "webcam girls": 2, "cam girls": 2, "nude pics": 2, "nudes": 1,
    "live sex": 2, "free sex": 2, "sex video": 1.5, "sex videos": 1.5, "camgirl": 2, "onlyfans": 1,
    "milf": 2, "milfs": 2, "gangbang": 2, "threesome": 1, "bukkake": 2, "creampie": 1.5,
    "blowjob": 2, "blowjobs": 2, "handjob": 2, "deepthroat": 2, "cumshot": 2, "cumshots": 2,
    "anal sex": 0.8, "oral sex": 0.6, "bdsm": 0.8, "fetish": 0.6, "escort girls": 1.5,
    "escorts": 0.8, "horny": 1, "slutty": 1.5, "busty": 1, "big tits": 2, "tits": 1.5,
    "boobs": 1, "pussy": 1.5, "cock": 0.8, "dick": 0.5, "cum": 0.8, "cumming": 2, "fucking": 0.7,
    "fucked": 0.7, "fuck": 0.7, "dildo": 1, "dildos": 1, "upskirt": 2, "camel toe": 1.5,
    # words that medicine and schools use as well
    "sex": 0.3, "sexy": 0.5, "naked": 0.3, "nude": 0.4, "erotic": 0.5, "erotica": 0.7,
    "penis": 0.4, "vagina": 0.4, "clitoris": 0.5, "anus": 0.4, "anal": 0.5, "orgasm": 0.6,
    "orgasms": 0.6, "masturbation": 0.5, "masturbate": 0.6, "masturbating": 0.7, "ejaculation": 0.4,
    "erection": 0.4, "genitals": 0.3, "breasts": 0.3, "nipples": 0.5,
    # German, French, Spanish, Italian, Portuguese
    "pornos": 1, "sexfilme": 2, "sexkontakte": 2, "ficken": 1, "gefickt": 1, "muschi": 1,
    "titten": 1.5, "geile": 0.7, "nutten": 1, "porno gratuit": 2, "salope": 1, "baise": 0.8,
    "chatte": 0.5, "putas": 1, "tetas": 1, "follando": 1.5, "culo": 0.5,
    "porno gratis": 2, "scopare": 0.7, "tette": 1, "buceta": 1.5, "putaria": 1.5,
}  # fmt: skip

_CONTEXT = """anatomy anatomical biology biological cancer cervical clinic clinical consent
contraception contraceptive counseling court crime curriculum diagnosis disease disorder doctor
education educational gender gynecology gynecologist health healthcare hiv hormone hospital
hygiene infection law legal medical medicine nurse patient patients pediatric physician pregnancy
prevention psychology puberty reproductive research researchers school screening sexology species
std sti students study surgery symptoms syndrome therapist therapy transmitted treatment urology
vaccine arzt gesundheit krankheit medizin aufklärung médecin santé maladie éducation médico salud
enfermedad educación medico salute malattia"""
CONTEXT_WORDS = frozenset(_CONTEXT.split())
"""Words that say that a text is about medicine, education, research or law (ours)."""
