"""Sentences of many lengths and subjects, in the mixed order in which requests come; written for this benchmark."""

SENTENCES = (
    "The library closes at eight on weekdays and at five on Sundays.",
    "Can I change the delivery address after I have paid?",
    "Bring two litres of salted water to the boil, add the pasta, and take it out a minute before the packet says so, "
    "because it goes on cooking in the sauce; keep a cup of the water, whose starch binds oil and cheese.",
    "Thanks!",
    "The committee published its report on coastal erosion last Thursday.",
    "A fault in the signalling system delayed trains between the two cities for most of the morning.",
    "How do I reset my password if I no longer have the old telephone number?",
    "In the eighteenth century, clockmakers competed to build a timepiece that would keep its rate on a rolling ship, "
    "since a navigator who knows the hour at home and measures noon where he is can work out how far east or west he "
    "has sailed. The prize went, after decades of argument, to a carpenter's son from Yorkshire whose fourth attempt "
    "looked like a large pocket watch and lost five seconds in eighty-one days at sea.",
    "The cat slept on the warm bonnet of the car.",
    "Our quarterly revenue rose by four percent, while costs stayed level.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Please find attached the minutes of Tuesday's meeting, with the three decisions marked in bold.",
    "The function returns a copy of the list, so changing the result does not change the argument.",
    "She had walked the same road for thirty years and knew each tree by the sound the wind made in it.",
    "What time does the last ferry leave?",
    "Glaciers carve valleys with broad floors and steep walls, whereas rivers alone cut narrow ones shaped like a "
    "letter V; where both have been at work, the lower slopes tell of the water and the upper ones of the ice.",
    "The defendant appealed, arguing that the evidence had been obtained without a warrant.",
    "Rain is expected from the west by noon, turning to sleet on higher ground.",
    "Two tablets with food, not more than twice a day.",
    "The museum's new wing holds ceramics from the Song dynasty, lent by a private collector.",
    "To replace the filter, turn off the supply, place a bucket below the housing, unscrew it by hand, and wipe the "
    "seal before you fit the new cartridge; run the tap for two minutes afterwards and throw that water away.",
    "I love this song.",
    "Interest is calculated daily and credited on the last working day of each month.",
    "Astronomers have found a planet that circles its star in less than eight hours.",
    "The goalkeeper was sent off in the final minute, but her team held on to win by a single goal.",
    "If the test fails only on one machine, look first at what differs between the machines: the versions of "
    "libraries, the locale, the time zone, the number of processors and the order in which the file system lists a "
    "directory. Most failures that come and go have their cause in one of these, and few in the code that was changed "
    "last.",
    "Vaccination rates have recovered to the level of four years ago.",
    "He tuned the violin by ear, slowly, while the audience waited.",
    "The lease may be ended by either party with three months' notice in writing.",
    "Bees dance to tell each other where the flowers are.",
    "Memory bandwidth, rather than arithmetic, limits how fast a large language model writes text one token at a time.",
    "Where is the nearest pharmacy that is open now?",
)
