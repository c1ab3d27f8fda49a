"""Running transforms in place: what lies where, and what runs when."""
