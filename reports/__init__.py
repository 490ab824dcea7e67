"""What a run leaves for people: the summary contract, the table, the plots and the page that joins them.

Nothing here imports the rest of the code base; every function takes plain numbers, dictionaries and paths.
"""
