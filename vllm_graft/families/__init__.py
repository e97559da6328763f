"""One file per library: where its attention is and how its parts are called."""
