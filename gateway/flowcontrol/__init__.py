"""Flow control: who goes next, what it cost, and who is charged."""
