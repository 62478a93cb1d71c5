"""`python -m drafttrain`, and thus `accelerate launch -m drafttrain train RECIPE`."""

from drafttrain.cli import main

main()
