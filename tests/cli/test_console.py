"""Numbers as the commands print them."""

from nerve.cli.console import counts, duration


def test_counts_come_before_their_names_and_other_facts_behind_theirs():
    described = {
        "corpus": "digits",
        "n_train_images": 1433,
        "n_train_epochs": 28.1,
        "image_size": 8,
    }
    assert counts(described) == (
        "corpus digits, 1,433 train images, 28.1 train epochs, image size 8"
    )


def test_a_duration_has_its_two_largest_units():
    assert [duration(seconds) for seconds in (0.2, 42, 425, 12_000, 187_200)] == [
        *("0 s", "42 s", "7 min 5 s", "3 h 20 min", "2 d 4 h"),
    ]
