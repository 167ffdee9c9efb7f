"""The benchmark suite: cases declared once, checked before they are timed, reported as ratios."""
