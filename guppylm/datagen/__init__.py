"""From character files to conversations: the grammar, how people type, the data set and its lint."""
