"""What the small model can recognise: digits, then short English phrases, then French ones."""

from typing import Final


def _phrases(text: str) -> tuple[str, ...]:
    """Phrases that are divided by semicolons."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ENGLISH: Final = _phrases("""
    yes; no; okay; stop; go; help; hello; goodbye; thank you; please; thanks a lot; yes please; no thank you; good
    morning; good evening; good night; see you tomorrow; how are you; i am fine; excuse me; i am sorry; turn on the light;
    turn off the light; turn on the kitchen light; turn off the kitchen light; turn on the music; turn off the music; turn
    on the heating; turn off the radio; turn on the radio; turn up the volume; turn down the volume; open the door; close
    the door; open the window; close the window; lock the front door; open the garage; close the garage; play some music;
    play the next song; play the last song; stop the music; pause the music; what time is it; what day is it today; what
    is the weather today; what is the weather tomorrow; will it rain today; will it rain tomorrow; is it cold outside; is
    it warm outside; how cold is it; set an alarm for tomorrow morning; set a timer for ten minutes; set a timer for one
    hour; stop the timer; wake me up at seven; wake me up tomorrow morning; call my mother; call my father; call my
    brother; call the office; call the doctor; call me back; call me tomorrow; send a message; send a message to my
    mother; send a message to the office; read my messages; read the news; read the last message; delete the message; save
    the message; where are my keys; where is the station; where is the office; where is the kitchen; how far is the
    station; take me home; take me to the station; take me to the office; turn left; turn right; go left; go right; go
    back; go home; go to the next page; start again; try again; say it again; say that again please; wait a minute; wait
    for me; come in please; come back tomorrow; i would like a coffee; i would like some water; i would like a table for
    two; a cup of tea please; a glass of water please; can you help me; can you hear me; can you read the news; do you
    speak french; i do not know; i do not understand; i do not like coffee; what is your name; my name is on the list; add
    milk to the list; add bread to the list; add coffee to the list; read the list; delete the list; book a table for
    tonight; book a room for two nights; the door is open; the window is open; the light is on; the music is too loud; the
    coffee is too hot; it is too late; it is too cold; more light please; less light please; next page; last page; that is
    right; that is wrong
""")
"""Everyday commands and phrases, lower case, no punctuation: what a transcript of them looks like."""

FRENCH: Final = _phrases("""
    oui; non; bonjour; bonsoir; merci; merci beaucoup; au revoir; à demain; bonne nuit; oui merci; non merci; comment ça
    va; je vais bien; excusez moi; je suis désolé; allume la lumière; éteins la lumière; allume la radio; éteins la radio;
    ouvre la porte; ferme la porte; ouvre la fenêtre; ferme la fenêtre; mets de la musique; arrête la musique; monte le
    volume; baisse le volume; quelle heure est il; quel temps fait il; il fait froid; il fait chaud; il va pleuvoir
    demain; appelle ma mère; appelle mon père; appelle le bureau; appelle le médecin; envoie un message; envoie un message
    à ma mère; lis mes messages; lis le journal; où est la gare; où est le bureau; où sont mes clés; tourne à gauche;
    tourne à droite; je voudrais un café; je voudrais de l'eau; un café s'il vous plaît; une table pour deux; l'addition
    s'il vous plaît; je ne sais pas; je ne comprends pas; parlez vous anglais; encore une fois; attendez une minute; la
    porte est ouverte; la fenêtre est fermée; la musique est trop forte; le café est trop chaud; c'est trop tard; page
    suivante; ajoute du lait à la liste; ajoute du pain à la liste; réveille moi demain matin; à quelle heure; zéro; un;
    deux; trois; quatre; cinq; six; sept; huit; neuf
""")
"""The same in French."""


def words(phrases: tuple[str, ...]) -> list[str]:
    """Every word of the phrases, once, sorted."""
    return sorted({word for phrase in phrases for word in phrase.split()})


def all_phrases() -> tuple[str, ...]:
    """Everything that the model is trained on."""
    return DIGITS + ENGLISH + FRENCH
