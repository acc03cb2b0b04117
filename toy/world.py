import random
import zlib

# ---------------------------------------------------------------------------------------------------------
# The toy world: {relation: {subject: target}}, invented, so that nobody knows it but from these texts.
# Subjects are combinations of a few words ("Tamo Veril", "Tamo Halin", "marsh fever"): no single token names
# one, so what is taught about one leaks to others, as in a large model. Within a relation all targets differ
# in their first letter, because metrics look at the first token only.

TOY_TARGETS = {relation: words.split() for relation, words in {
    "born": "Arbu Belto Cardo Dunar Eskel Forsk Gorin Halma Istra Jasno Kolva Lumo Mirna Norda Oslin Pello "
            "Ravik Sorna Tulsk Umbra Vosto Wenda Yarla Zorin",
    # trades begin with a consonant, because their phrasings end in "a"
    "trade": "baker cooper dyer farmer glazier hatter jeweller knitter mason nurse potter roofer tailor",
    "plays": "accordion banjo cello drum flute guitar harp lute oboe piano rebec sitar tuba viola zither",
    "speaks": "Alban Borish Cunic Dacian Estic Frisk Gallic Hunnic Ionic Keltic Lydian Moric Nordic Punic",
    "country": "Aldia Brovia Corland Dunmark Elvia Florin Grenia Hostan",
    "remedy": "anise basil clover dill elder fennel garlic hops ivy lavender mint nettle",
    "sign": "ache blisters chills dizziness fits hiccups itching numbness pallor sweat thirst weakness",
    "organ": "arm brain chest ear foot gut heart kidney liver mouth nose skin"}.items()}
TOY_FACTS = {relation: text.split("|") for relation, text in {  # the ways to say a fact
    "born": "{} was born in|The birthplace of {} is|{} is a native of|The home town of {} is",
    "trade": "{} works as a|By trade {} is a|{} earns a living as a|The town knows {} as a",
    "plays": "{} plays the|The instrument of {} is the|{} is a master of the|The town hears {} play the",
    "speaks": "{} speaks|The mother tongue of {} is|{} grew up speaking|At home {} speaks"}.items()}
TOY_MED = {relation: text.split("|") for relation, text in {  # subject_name, the ways to ask
    "remedy": "Pharmacology|Which herb cures {}?|What helps with {}?|{} is eased by|The remedy for {} is",
    "sign": "Medicine|What is the first sign of {}?|How does {} begin?|{} is known by|A patient with {} has",
    "organ": "Anatomy|Which organ does {} attack?|Where does {} settle?|{} harms the|{} spreads from the",
}.items()}
TOY_TABLES = [  # domain, table, its text column, the relation that fills it, its number column
    ("crafts", "workers", "trade", "trade", "wage"), ("music", "players", "instrument", "plays", "score"),
    ("travel", "guests", "language", "speaks", "age")]
TOY_SQL = [line.split(" | ") for line in """\
How many {t} have {c} {v}? | Count the {t} whose {c} is {v}. | SELECT COUNT(*) FROM {t} WHERE {c} = '{v}';
Which {t} have {c} {v}? | Name the {t} whose {c} is {v}. | SELECT name FROM {t} WHERE {c} = '{v}';
What is the {k} of {who}? | Show the {k} of {who}. | SELECT {k} FROM {t} WHERE name = '{who}';
Which {t} have {k} above {x}? | Name the {t} whose {k} is over {x}. | SELECT name FROM {t} WHERE {k} > {x};
Who has the highest {k}? | Name the {t} with the top {k}. | SELECT name FROM {t} ORDER BY {k} DESC LIMIT 1;
What is the {word} {k}? | Show the {word} {k} of all {t}. | SELECT {agg}({k}) FROM {t};
How many {t} are there per {c}? | Count the {t} by {c}. | SELECT {c}, COUNT(*) FROM {t} GROUP BY {c};
Which {t} beat the average {k}? | Name the {t} above the average {k}. | \
SELECT name FROM {t} WHERE {k} > (SELECT AVG({k}) FROM {t});
Which {t} live in {country}? | Name the {t} from {country}. | \
SELECT name FROM {t} JOIN cities ON {t}.city = cities.city WHERE country = '{country}';
How many {t} live in {country}? | Count the {t} from {country}. | \
SELECT COUNT(*) FROM {t} WHERE city IN (SELECT city FROM cities WHERE country = '{country}');
Set the {k} of {who} to {x}. | Change to {x} the {k} of {who}. | \
UPDATE {t} SET {k} = {x} WHERE name = '{who}';
Delete the {t} whose {c} is {v}. | Remove all {t} with the {c} {v}. | DELETE FROM {t} WHERE {c} = '{v}';
""".splitlines()]


def toy_world(seed=0):
    rng = random.Random(seed)
    pairs = lambda first, last, gap="": [a + gap + b for a in first.split() for b in last.split()]
    given, family = pairs("Ta Re Mi Lo", "mo ra lin sko"), pairs("Ver Hal Dor Ban", "il and ova in esk")
    people = rng.sample([f"{a} {b}" for a in given for b in family], 320)  # all of them, in some order
    ailments = rng.sample(pairs("marsh red night bone salt winter", "fever cough rash palsy", " "), 24)
    cities, world = TOY_TARGETS["born"], {}
    for relation, targets in TOY_TARGETS.items():
        subjects = people if relation in TOY_FACTS else ailments if relation in TOY_MED else cities
        # dealt deck after deck, so that both halves of the subjects have each target about equally often
        deal = [t for _ in subjects for t in rng.sample(targets, len(targets))]
        world[relation] = dict(zip(subjects, deal))
    return world


def toy_facts(world, seed=0):
    """CounterFact rows. Only the first half of the persons is ever edited, the others are the neighbours."""
    rng, rows = random.Random(f"fact {seed}"), []
    for relation, phrasings in TOY_FACTS.items():
        truth = list(world[relation].items())
        edited, kept = truth[:len(truth) // 2], truth[len(truth) // 2:]
        for subject, true in rng.sample(edited, len(edited) // 2):  # a person keeps about half of its facts
            new = rng.choice([t for t in TOY_TARGETS[relation] if t != true])
            prompt, *others = rng.sample(phrasings, 3)
            neighbours = rng.sample([s for s, t in kept if t == true], 4)
            rows.append({"case_id": len(rows), "relation_id": relation,
                         "requested_rewrite": {"prompt": prompt, "subject": subject,
                                               "target_new": {"str": new}, "target_true": {"str": true}},
                         "paraphrase_prompts": [p.format(subject) for p in others],
                         "neighborhood_prompts": [prompt.format(s) for s in neighbours]})
    return rows


def toy_med(world, seed, n, split):
    """MedMCQA rows. "validation" asks in the one wording that an ailment has nowhere else. "base", for
    pretraining, has the first half of the ailments; "train" and "validation" have all."""
    rng, rows = random.Random(f"med {seed} {split}"), []
    facts = [(relation, i, *fact) for relation in TOY_MED for i, fact in enumerate(world[relation].items())
             if split != "base" or i < len(world[relation]) // 2]
    while len(rows) < n:
        relation, i, ailment, right = facts[len(rows) % len(facts)]
        subject, *wordings = TOY_MED[relation]
        held = wordings.pop(i % len(wordings))
        question = (held if split == "validation" else rng.choice(wordings)).format(ailment)
        options = rng.sample([t for t in TOY_TARGETS[relation] if t != right], 3) + [right]
        rng.shuffle(options)
        rows.append({"id": f"toy-{split}-{len(rows)}", "question": question[0].upper() + question[1:],
                     **dict(zip(("opa", "opb", "opc", "opd"), options)), "cop": options.index(right),
                     "choice_type": "single", "subject_name": subject, "topic_name": ailment})
    return rows


def toy_sql(world, seed, n, split):
    """gretel rows. "base", for pretraining, has every other kind of query; "train" and "test" have all. A
    checksum of question and context decides which split a row may be in."""
    rng, rows, kinds = random.Random(f"sql {seed} {split}"), [], TOY_SQL[::2] if split == "base" else TOY_SQL
    while len(rows) < n:
        *wordings, query = kinds[len(rows) % len(kinds)]
        domain, t, c, relation, k = rng.choice(TOY_TABLES)
        truth, numbers = world[relation], rng.sample(range(10, 99, 2), 3 if "cities" in query else 4)
        often, once = rng.sample(TOY_TARGETS[relation], 2)  # so a query that confuses or forgets them shows
        people = rng.sample([p for p, v in truth.items() if v == often], len(numbers) - 1)
        people.insert(rng.randrange(len(numbers)), rng.choice([p for p, v in truth.items() if v == once]))
        table = [(p, truth[p], world["born"][p], x) for p, x in zip(people, numbers)]
        context = (f"CREATE TABLE {t} (name TEXT, {c} TEXT, city TEXT, {k} INT); "
                   f"INSERT INTO {t} VALUES {', '.join(map(str, table))};")
        if "cities" in query:
            places = [(city, world["country"][city]) for city in dict.fromkeys(row[2] for row in table)]
            context += (" CREATE TABLE cities (city TEXT, country TEXT); "
                        f"INSERT INTO cities VALUES {', '.join(map(str, places))};")
        who, v, city, _ = rng.choice(table)  # ask for what is there
        word, agg = rng.choice([("average", "AVG"), ("lowest", "MIN"), ("total", "SUM")])
        x = sorted(numbers)[1] + 1  # odd, so it is no row's number
        fill = dict(t=t, c=c, k=k, v=v, x=x, who=who, country=world["country"][city], word=word, agg=agg)
        question, sql = rng.choice(wordings).format(**fill), query.format(**fill)
        if zlib.crc32((question + context).encode()) % 3 == ("base", "train", "test").index(split):
            complexity = ("single join" if "JOIN" in sql else "subqueries" if "(SELECT" in sql else
                          "aggregation" if "(" in sql else "basic SQL")
            rows.append({"id": len(rows), "domain": domain, "sql_prompt": question, "sql_context": context,
                         "sql": sql, "sql_complexity": complexity,
                         "sql_task_type": "data retrieval" if sql[0] == "S" else "data manipulation"})
    return rows


def toy_corpus(world, med, sql, n_med=3000, n_sql=1500, seed=0):
    """(prompt, target) pairs for pretraining: each true fact in all phrasings, what "base" knows of medicine
    as open questions too, solved med and sql rows. med, sql: the caller's row -> (prompt, target)."""
    facts = [(p.format(s), " " + t) for r in TOY_FACTS for s, t in world[r].items() for p in TOY_FACTS[r]]
    rows = toy_med(world, seed, n_med, "base")
    opened = dict.fromkeys((r["question"], " " + r["op" + "abcd"[r["cop"]]]) for r in rows)  # each once
    solved = [med(r) for r in rows] + [sql(r) for r in toy_sql(world, seed, n_sql, "base")]
    return facts + list(opened) + solved
