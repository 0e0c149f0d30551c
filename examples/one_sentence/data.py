"""Write prompts.jsonl, the prompts of this recipe: a topic, and a word that has to be said."""

import json
import random
from itertools import product

TOPICS = "the sea,a garden,a dog,winter,breakfast,a train,the moon,school,music,a river,a market,rain,a bridge,a letter"
TOPICS += ",the wind,a teacher,a cat,summer,a long walk,bread,a clock,the city,a forest,a birthday,a boat,snow"
WORDS = "blue,slowly,friend,window,seven,morning,quiet,paper,green,always,little,home"

if __name__ == "__main__":
    rows = [
        {"prompt": f'Write one short sentence about {topic} that has the word "{word}".', "word": word}
        for topic, word in product(TOPICS.split(","), WORDS.split(","))
    ]
    random.Random(0).shuffle(rows)
    with open("prompts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
