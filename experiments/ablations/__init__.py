"""Small comparisons on embedded data: each script is one question, several arms, several seeds."""
