"""Times collectives over sizes, checks their results, and holds the times against floor and prediction."""
