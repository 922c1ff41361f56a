"""Ordinary problems that look as if they had to go: each one removed by `clean` is a mistake.

KNOWN were written first and the rules changed with them at hand; UNSEEN were written afterwards and measured once.
"""

KNOWN = [
    ("Find the area of the figure enclosed by |x| + |y| = 2.", "8"),
    ("The parabola y = x^2 and the line y = 4 bound a region. What is the area of the figure?", "\\frac{32}{3}"),
    ("A figure skater turns 3 times a second. How many turns are that in 20 seconds?", "60"),
    ("Round 3.14159 to three significant figures.", "3.14"),
    ("A picture costs 40 euros and its frame half as much. What do both cost together?", "60"),
    ("The graph of y = x^2 - 1 is cut off. What area lies under the graph above the x-axis from 1 to "
     "2?", "\\frac{4}{3}"),
    ("As shown by Euler, the sum of 1/n^2 is \\pi^2/6. What is the sum of 1/(2n)^2?", "\\frac{\\pi^2}{24}"),
    ("What is the sum of the page numbers in the picture book with pages 1 to 20?", "210"),
    ("From the figure 1234 one digit is struck out. What is the largest number that can remain?", "234"),
    ("The king, pictured on every stamp, is drawn 12 times. How many stamps are in 5 sheets of 12?", "60"),
    ("Find the volume of the figure obtained by turning y = x, 0 < x < 3, about the x-axis.", "9\\pi"),
    ("A complete graph on 6 vertices is drawn. How many edges has it?", "15"),
    ("In a true-or-false quiz with 10 questions, how many answer keys are possible?", "1024"),
    ("A true/false test has 5 questions. What is the probability that all guesses are right?", "\\frac{1}{32}"),
    ("Ten voters say yes or no. How many outcomes of the ballot are there?", "1024"),
    ("For how many integers n is it true that n^2 < 50?", "15"),
    ("True or false gates: each of 3 switches is true or false. Find the number of states.", "8"),
    ("What is the chemical symbol of element 102?", "No"),
    ("A robot faces north and turns by 450 degrees to the right. Which way has it turned in effect?", "right"),
    ("Which real numbers x satisfy x^2 = -1?", "none"),
    ("Find all primes between 24 and 28.", "none"),
    ("What is the sign of the product (-1)(-2)(-3)?", "-"),
    ("A multiple-choice test has 20 questions with 4 options each. How many answer sheets are possible?", "4^{20}"),
    ("In how many ways can a coach choose the best 3 of 8 players?", "56"),
    ("Triangle with (A) at (0,0), (B) at (3,0), (C) at (0,4). What is its area?", "6"),
    ("Machine A: 3 parts an hour. Machine B: 4 parts. Machine C: 5 parts. How many parts do they make "
     "in 2 hours?", "24"),
    ("Suppose (a) n > 3, (b) n is prime, (c) n < 7. Find n.", "5"),
    ("Rules of a game:\n1. Find a coin: 2 points.\n2. Lose a coin: what you lose is 1 point.\nAnn finds "
     "5 and loses 3. What is her score?", "7"),
    ("Do this with n = 5:\n1) Compute n^2.\n2) Evaluate it modulo 7.\nThe result is what?", "4"),
    ("Let p be the smallest whole number for which one can show that p^2 > 50. Give p.", "8"),
    ("A lawyer has to prove that her client owns 3 of 5 plots. State the number of choices of 3 plots.", "10"),
    ("Which of these happens more often in 36 throws of two dice, and how many times: a sum of 7?", "6"),
    ("Players A, B and C. share 12 sweets equally. How many has each?", "4"),
    ("Part 2 of a book has 3 times as many pages as part 1. Both have 120. How long is part 2?", "90"),
    ("A map is drawn to a scale of 1:50000. How many km are 3 cm?", "1.5"),
    ("A choir sings part A twice and part B three times. Part A takes 2 minutes, part B 3. How long "
     "does it take?", "13"),
]

UNSEEN = [
    ("The figure consists of a square of side 2 and a half circle on one side. What is the perimeter "
     "of the figure?", "6+\\pi"),
    ("See to it that the drawing above all has no crossing edges: how many edges can a planar graph "
     "on 5 vertices have?", "9"),
    ("In the illustration of a theorem a teacher uses n = 12. How many divisors has n?", "6"),
    ("The picture shown to 8 people is liked by 6. What share likes it?", "\\frac{3}{4}"),
    ("An image of 640 by 480 pixels takes 3 bytes a pixel. How many bytes is the image?", "921600"),
    ("A chart is 3 m wide and its area is 6 m^2. How high is the chart?", "2"),
    ("Reflect the point (2, 3) in the line y = x. Give the image.", "(3, 2)"),
    ("A six-figure number begins with the figure 7 and is divisible by 99999. Find it.", "799992"),
    ("How many true statements are there among: 2 is prime, 9 is prime, 11 is prime?", "2"),
    ("A coin is called true if it is fair. What is the probability that a true coin shows heads "
     "twice?", "\\frac{1}{4}"),
    ("A liar says yes or no at random to 4 questions. What is the probability of 4 times yes?", "\\frac{1}{16}"),
    ("Determine the smallest n for which it is correct that 2^n > 1000.", "10"),
    ("Who is the nemesis of yes in a debate: which word has two letters?", "no"),
    ("How many real solutions has x^4 = -16?", "none"),
    ("What comes between + and + in the sign pattern of a 3 by 3 cofactor matrix?", "-"),
    ("A single-choice exam has 3 options for each of 6 questions. How many ways are there to fill it in?", "729"),
    ("In how many ways can you select the best, second and third of 10 runners?", "720"),
    ("Towns A. B. C. lie on a road in this order, AB = 3 km and BC = 4 km. How far is A from C?", "7"),
    ("Vitamin A: 2 mg, vitamin B: 3 mg, vitamin C: 5 mg are in a pill. How many mg are in 4 pills?", "40"),
    ("For sets (a) {1}, (b) {1,2} and (c) {1,2,3}, determine the sum of all elements.", "10"),
    ("Follow the recipe.\n1. Find the square of 3.\n2. Find its double.\nWhat do you get?", "18"),
    ("One can prove that \\sqrt{2} lies between two neighbouring tenths. State the lower one.", "1.4"),
    ("A theorem that we prove later says a_n = 3n - 1. Write a_4 as a number.", "11"),
    ("Which of the following terms of 2, 6, 18, ... is the first above 100? Give its number in the sequence.", "5"),
    ("(i) Let f(x) = 2x. (ii) Let g(x) = x + 1. (iii) Compute f(g(2)).", "6"),
    ("The proof of a print is 20 by 30 cm. What is its area in cm^2?", "600"),
]
