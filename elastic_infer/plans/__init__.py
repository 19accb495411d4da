"""Plans: which width reads and samples which token."""
