"""What a run record says, for every tab: words, answer cards, and what the browser draws."""
