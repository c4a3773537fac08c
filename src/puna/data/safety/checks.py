"""Check digits and tables of numbers that identify a person, an account or a card."""

from __future__ import annotations

from collections import Counter

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24,
    "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22,
    "VG": 24, "XK": 20,
}  # fmt: skip
"""Country -> characters of its IBAN (ISO 13616 registry)."""

_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_CF_MONTHS = "ABCDEHLMPRST"
_CF_OMOCODE = {letter: str(digit) for digit, letter in enumerate("LMNPQRSTUV")}
_CF_ODD: dict[str, int] = {
    **dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True)),
    **dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ",
               (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22,
                25, 24, 23), strict=True)),
}  # fmt: skip
_MAESTRO = frozenset((5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763))
_TEST_CARDS = frozenset({
    "4111111111111111", "4242424242424242", "4012888888881881", "4000056655665556",
    "4000000000000002", "5555555555554444", "5105105105105100", "5200828282828210",
    "2223003122003222", "378282246310005", "371449635398431", "6011111111111117",
    "6011000990139424", "30569309025904", "3530111333300000",
})  # fmt: skip
_KNOWN_SSNS = frozenset({"078051120", "219099999", "123456789", "457555462"})


def luhn(digits: str) -> bool:
    """Check the last digit by Luhn's formula (ISO/IEC 7812-1)."""
    total = 0
    for place, char in enumerate(reversed(digits)):
        digit = int(char) << (place & 1)
        total += digit - 9 if digit > 9 else digit
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Tell whether digits are the number of a payment card: issuer, length and Luhn's formula.

    Numbers that payment providers publish for tests are no one's, and are not accepted.
    """
    n, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    known = (
        (digits[0] == "4" and n in (13, 16, 19))
        or (n == 16 and (51 <= two <= 55 or 2221 <= four <= 2720))
        or (n == 15 and two in (34, 37))
        or (n == 16 and (four == 6011 or two == 65 or 644 <= three <= 649))
        or (n == 14 and (two in (36, 38, 39) or 300 <= three <= 305))
        or (n == 16 and 3528 <= four <= 3589)
        or (n in (16, 19) and two == 62)
        or (n == 15 and four in (1800, 2131))
        or (12 <= n <= 19 and four in _MAESTRO)
    )
    return known and len(set(digits)) > 3 and luhn(digits) and digits not in _TEST_CARDS


def is_iban(text: str) -> bool:
    """Check country, length and the remainder of an IBAN without spaces (ISO 7064 mod 97-10)."""
    if IBAN_LENGTHS.get(text[:2]) != len(text) or text[2:4] in ("00", "01", "99"):
        return False
    turned = text[4:] + text[:4]
    return int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


def is_us_ssn(digits: str) -> bool:
    """Tell whether nine digits could be a social security number; it has no check digit."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return (
        area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
        and len(set(digits)) > 2 and digits not in _KNOWN_SSNS
    )  # fmt: skip


def is_de_tax_id(digits: str) -> bool:
    """Check a German tax id: 11 digits, how often digits occur, ISO 7064 mod 11,10."""
    if digits[0] == "0":
        return False
    counts = sorted(Counter(digits[:10]).values(), reverse=True)
    if counts[0] not in (2, 3) or counts[1] != 1:
        return False
    product = 10
    for char in digits[:10]:
        total = (int(char) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def is_fr_nir(text: str) -> bool:
    """Check the key of a French social security number of 15 characters, Corsica's among them."""
    number = int(text[:13].replace("2A", "19").replace("2B", "18"))
    return 97 - number % 97 == int(text[13:])


def is_es_dni(text: str) -> bool:
    """Check the letter of a Spanish DNI (8 digits) or NIE (X, Y or Z and 7 digits)."""
    number = text[:-1].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return _DNI_LETTERS[int(number) % 23] == text[-1] and text != "12345678Z"


def is_it_codice_fiscale(text: str) -> bool:
    """Check an Italian tax code of 16 characters: month, day and the last letter."""
    digits = "".join(_CF_OMOCODE.get(char, char) for char in text[6:8] + text[9:11] + text[12:15])
    if not digits.isdigit() or text[8] not in _CF_MONTHS:
        return False
    if not 1 <= int(digits[2:4]) % 40 <= 31:
        return False
    return chr(65 + codice_fiscale_sum(text[:15]) % 26) == text[15]


def codice_fiscale_sum(text: str) -> int:
    """Return the sum over the first 15 characters that decides the last one."""
    even = sum(int(char) if char.isdigit() else ord(char) - 65 for char in text[1::2])
    return even + sum(_CF_ODD[char] for char in text[::2])
