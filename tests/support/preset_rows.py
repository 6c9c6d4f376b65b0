"""Two or three invented rows of every preset's set, with the fields of the real one, and the texts that they become."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
ANSWER_WITH_A_LETTER = "\n\nAnswer with the letter of the right choice."
ENTITIES = (
    'Name the entities in this sentence, one per line as "entity: type". The types are CARDINAL, DATE, EVENT, FAC, '
    "GPE, LANGUAGE, LAW, LOC, MONEY, NORP, ORDINAL, ORG, PERCENT, PERSON, PRODUCT, QUANTITY, TIME and WORK_OF_ART. If "
    'there are none, answer "none".\n\n'
)


def gpqa(record: str, question: str, *answers: str) -> Row:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    return {"Record ID": record, "Question": question, **dict(zip(names, answers, strict=True)), "Subdomain": "x"}


def medmcqa(question: str, cop: int) -> Row:
    options = {f"op{letter}": f"organ {letter}" for letter in "abcd"}
    return {"id": question, "question": question, **options, "cop": cop, "exp": None, "subject_name": "Anatomy"}


def arc(question: str, texts: list[str], labels: list[str], key: str) -> Row:
    return {"id": question, "question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def truthfulqa(question: str, answer: str) -> Row:
    return {"type": "x", "category": "c", "question": question, "best_answer": answer, "correct_answers": [answer]}


SETS: dict[str, list[tuple[Row, str, str]]] = {
    "gsm8k": [
        (
            {"question": "Ann has 2 bags of 3 nuts. How many?", "answer": "2*3 = <<2*3=6>>6 nuts.\n#### 6"},
            "Ann has 2 bags of 3 nuts. How many?",
            "2*3 = 6 nuts.\n#### 6",
        ),
        ({"question": "1+1?", "answer": "#### 2"}, "1+1?", "#### 2"),
    ],
    "humaneval": [
        (
            {
                "task_id": 7,
                "text": "Write a function to double a number.",
                "code": "def double(x):\r\n    return 2 * x",
                "test_list": ["assert double(1) == 2", "assert double(4) == 8"],
                "test_setup_code": "",
                "challenge_test_list": [],
            },
            "Write a function to double a number.\nYour code should pass these tests:\n\n"
            "assert double(1) == 2\nassert double(4) == 8",
            "def double(x):\n    return 2 * x",
        )
    ],
    "math-500": [
        (
            {"problem": "What is $1+2$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{3}$."},
            "What is $1+2$?",
            r"It is $\boxed{3}$.",
        )
    ],
    "ontonotes5": [
        (
            {"tokens": ["Phil", "Rosen", "likes", "Boston", "."], "tags": [4, 5, 0, 7, 0]},
            ENTITIES + "Phil Rosen likes Boston .",
            "Phil Rosen: PERSON\nBoston: GPE",
        ),
        ({"tokens": ["It", "rains"], "tags": [0, 0]}, ENTITIES + "It rains", "none"),
        (
            # two entities of one type side by side, an inside tag without a beginning, and another type right after
            {"tokens": ["Oslo", "Bergen", "two", "dollars", "today"], "tags": [7, 7, 17, 17, 2]},
            ENTITIES + "Oslo Bergen two dollars today",
            "Oslo: GPE\nBergen: GPE\ntwo dollars: MONEY\ntoday: DATE",
        ),
    ],
    "medmcqa": [
        (
            medmcqa("Which organ?", 2),
            "Which organ?\n\nA. organ a\nB. organ b\nC. organ c\nD. organ d" + ANSWER_WITH_A_LETTER,
            "C",
        ),
        (
            medmcqa("And which?", 0),
            "And which?\n\nA. organ a\nB. organ b\nC. organ c\nD. organ d" + ANSWER_WITH_A_LETTER,
            "A",
        ),
    ],
    "arc-easy": [
        (
            arc("Which is cold?", ["ice", "fire", "sand", "wool"], ["A", "B", "C", "D"], "A"),
            "Which is cold?\n\nA. ice\nB. fire\nC. sand\nD. wool" + ANSWER_WITH_A_LETTER,
            "A",
        ),
        (
            arc("Which is hot?", ["ice", "fire", "snow"], ["1", "2", "3"], "2"),
            "Which is hot?\n\nA. ice\nB. fire\nC. snow" + ANSWER_WITH_A_LETTER,
            "B",
        ),
    ],
    "logiqa": [
        (
            {
                "context": "All cats sleep.",
                "question": "What follows?",
                "options": ["A. Tom barks.", "B. Cats sleep.", "C.Dogs sleep.", "D. Nobody sleeps."],
                "answer": "B",
            },
            "All cats sleep.\n\nWhat follows?\n\nA. Tom barks.\nB. Cats sleep.\nC. Dogs sleep.\nD. Nobody sleeps."
            + ANSWER_WITH_A_LETTER,
            "B",
        )
    ],
    "pubmedqa": [
        (
            {
                "pubid": 1,
                "question": "Does tea help?",
                "context": {"contexts": ["We gave tea.", "They slept."], "labels": ["A", "B"], "meshes": ["Tea"]},
                "long_answer": "Tea helps.",
                "final_decision": "yes",
            },
            "We gave tea.\nThey slept.\n\nDoes tea help? Answer yes, no or maybe.",
            "yes",
        )
    ],
}
"""By preset: rows, and the prompt and the response that each becomes. Sets that are dealt out are below."""

DEALT: dict[str, list[tuple[Row, str, str]]] = {
    "truthfulqa": [
        (truthfulqa(f"Is {i} even?", "Yes." if i % 2 == 0 else "No."), f"Is {i} even?", "No." if i % 2 else "Yes.")
        for i in range(40)
    ],
    "biomixqa": [
        (
            {"text": f"Which gene goes with {i}? Given list is: AB{i}, CD{i}", "correct_answer": f"CD{i}"},
            f"Which gene goes with {i}? Given list is: AB{i}, CD{i}",
            f"CD{i}",
        )
        for i in range(40)
    ],
}
"""Sets without a split for calibration, long enough that both parts hold something."""

GPQA_EXTENDED = [
    gpqa(f"rec{i}", f" Question {i} ", f"right {i}", f"wrong {i}", f" worse {i}", f"worst {i}") for i in range(8)
]
GPQA_DIAMOND = [row for row in GPQA_EXTENDED if row["Record ID"] in {"rec1", "rec4", "rec6"}]
