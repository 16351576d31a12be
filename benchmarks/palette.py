"""Okabe and Ito's palette, which the common kinds of colour blindness tell apart."""

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#000000",
)  # fmt: skip
