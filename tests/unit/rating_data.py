"""Classic rating data with published agreement values, as small as they were printed."""

import re

import numpy as np

NAN = float("nan")


def _matrix(text):
    return np.array([[NAN if cell == "*" else float(cell) for cell in row] for row in text.split()])


FLEISS_1971 = _matrix(
    "444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444 222333"
    " 144444 224445 333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224"
    " 111155 224444 133333 555555"
)
"""30 patients, 6 raters, 5 diagnoses (Fleiss, 1971, Psychological Bulletin 76)."""

FLEISS_COUNTS = np.array([
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
])  # fmt: skip
"""10 subjects, 14 raters, 5 categories: the worked example of Wikipedia's page on the kappa."""

KRIPPENDORFF_2011 = _matrix("123321412*** 1233224125*3 *3332342251* 12332441251*").T
"""4 observers, 12 units (Krippendorff, 2011, Computing Krippendorff's alpha-reliability)."""

KRIPPENDORFF_3 = _matrix("*****34121133*3 1*213343******* **21344*21133*4").T
"""3 coders, 15 units: the worked example of Wikipedia's page on the alpha."""

ANXIETY = _matrix("332 361 344 464 523 542 221 346 531 231 221 632 133 533 221 221 113 233 432 342")
"""20 subjects, 3 raters: `anxiety` of the R package irr."""

ANAESTHETIST = re.findall(
    r"\d+",
    "1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444"
    " 2223343 1111111 2223212 1211111 1112111 1111111 1111111 2222221 2221322 2222222 2222221"
    " 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121 1111111 3333233 1111111"
    " 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111"
    " 2222222",
)
"""45 patients; the first observer three times, four others once (Dawid and Skene, 1979)."""

ANAESTHETIST_LABELS = "142222132243121111222222112111131224233111212"
"""The likeliest class of each patient."""
