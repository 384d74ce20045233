from dictionary_learning.cli import program

program()
