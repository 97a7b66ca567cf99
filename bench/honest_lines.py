"""Honest driving texts with the classes that each says are there, written without regard to how the reward reads them.

COPILOT: lines of many authors' styles. SENTENCES: action and reason as in BDD-X, where "The car" that begins a sentence
is the camera's own. REPORTS: short plain Microscope reports. Classes have COCO names: a cyclist is a bicycle and a
person; "van", "pickup" and "vehicle" name none (and stand next to a car or truck that is named); "bus stop", "bike
lane", "parking lot" name none. With exactly these classes in the evidence nothing in a text is wrong or missing.
"""

COPILOT = (
    # Ten lines that an earlier reward punished
    ("Fog, low visibility, car ahead, keep distance.", {"car"}),
    ("Night, rain: car ahead, keep distance.", {"car"}),
    ("Wet road, car braking ahead - ease off.", {"car"}),
    ("Highway, light traffic, truck in right lane, hold speed.", {"truck"}),
    ("Motorbike filtering between lanes, check mirrors, hold lane.", {"motorcycle"}),
    ("Queue at lights, three cars, stop, keep junction clear.", {"car", "traffic light"}),
    ("Bus stop: bus indicating, let it out.", {"bus"}),
    ("Bike lane busy, cyclists right, no right turn until clear.", {"bicycle", "person"}),
    ("Parking lot, woman with trolley behind cars, crawl.", {"person", "car"}),
    ("The car slows down because the traffic light ahead is red.", {"traffic light"}),
    # Headlines
    ("Truck blocks right lane", {"truck"}),
    ("Pedestrian on crossing, yield", {"person"}),
    ("Cyclist ahead, narrow road, wait to pass", {"bicycle", "person"}),
    ("Stop sign in 50 metres, slow down", {"stop sign"}),
    ("Train at level crossing, wait behind line", {"train"}),
    ("Red light. Two cars waiting. Stop behind them.", {"traffic light", "car"}),
    ("Dog loose on carriageway, brake", {"dog"}),
    ("Car cuts in from left, gap too short", {"car"}),
    # Radio and reports of position
    ("Traffic stopped ahead, bus on the hard shoulder, moving to lane two, over.", {"bus"}),
    ("Approaching junction, lights green, one car turning left across us, covering brake.", {"traffic light", "car"}),
    ("Unit eastbound on wet asphalt, lorry in front at 40, following at two seconds.", {"truck"}),
    ("Clear left, clear right, motorcycle behind, proceeding.", {"motorcycle"}),
    ("Holding at stop sign, pedestrian with pushchair crossing left to right, will proceed when clear.",
     {"stop sign", "person"}),
    ("Contact front: truck, stationary, hazards on. Changing lane left.", {"truck"}),
    # Colons and labels
    ("Hazard: cyclist, right edge. Action: give 1.5 m.", {"bicycle", "person"}),
    ("Scene: suburban street, dusk. Risk: child near parked cars. Advice: 20 km/h.", {"person", "car"}),
    ("Lead: white car, closing. Signal: red. Do: brake now.", {"car", "traffic light"}),
    ("Weather: snow. Ahead: truck with hazard lights. Speed: reduce.", {"truck"}),
    ("Priority: yield - tram line, bus merging from right.", {"bus"}),
    ("WARNING: pedestrian in road, emergency stop.", {"person"}),
    ("Status: free flow; lead car 30 m; no action needed.", {"car"}),
    # Lists with commas
    ("Dusk, dry, two lanes, car ahead steady, truck oncoming, keep right.", {"car", "truck"}),
    ("Crossroads, stop sign, bike from left, give way.", {"stop sign", "bicycle"}),
    ("City, evening, buses and taxis, people at kerb, stay slow.", {"bus", "car", "person"}),
    ("Sun low, glare, green light, pedestrians finishing, wait a moment.", {"traffic light", "person"}),
    ("Gravel road, dust, pickup and truck ahead, increase gap.", {"truck"}),
    ("Tunnel, headlights on, cars slowing, no lane change.", {"car"}),
    ("Roundabout, car from left, motorcycle inside, enter after both.", {"car", "motorcycle"}),
    # Semicolons
    ("Amber light; car behind close; do not brake hard; clear the junction.", {"traffic light", "car"}),
    ("Bus pulled over; passengers getting off; pass wide and slow.", {"bus", "person"}),
    ("Two cyclists abreast; oncoming van and car; stay behind.", {"bicycle", "person", "car"}),
    ("School zone; children on both sides; 30 limit; foot off.", {"person"}),
    # Advice in the imperative
    ("Slow down for the cyclist and pass only when the other lane is free.", {"bicycle", "person"}),
    ("Let the bus out, then carry on.", {"bus"}),
    ("Stop: the light has just turned red and people are stepping off the curb.", {"traffic light", "person"}),
    ("Keep two seconds from the black SUV, it brakes often.", {"car"}),
    ("Give the truck room, it is swinging wide to turn right.", {"truck"}),
    ("Do not overtake, motorcycle coming the other way.", {"motorcycle"}),
    ("Wait for the train to clear before crossing the tracks.", {"train"}),
    ("Mind the parked cars, a door is opening on the left.", {"car"}),
    ("Hold back, sheep on the road, engine off if they come close.", {"sheep"}),
    # American words
    ("Pickup and semi ahead merging onto freeway, back off and let them in.", {"truck"}),
    ("Four-way stop, sedan on right got there first, let it go.", {"car"}),
    ("School bus stopped with red flashers, stop and stay stopped.", {"bus"}),
    ("Guy on bike in crosswalk, hold the turn.", {"person", "bicycle"}),
    ("Signal out at intersection, cop directing traffic, treat as all-way stop.", {"traffic light", "person"}),
    ("Jaywalker mid-block, brake early.", {"person"}),
    # British words
    ("Dual carriageway, lorry pulling out to overtake, ease off and let it go.", {"truck"}),
    ("Zebra crossing, old man waiting at kerb, stop for him.", {"person"}),
    ("Lollipop lady in road, children crossing, wait.", {"person"}),
    ("Cars parked both sides, single track, pull into gap on left.", {"car"}),
    ("Double-decker at stop, cyclist coming round it, hang back.", {"bus", "bicycle", "person"}),
    ("Taxi doing a U-turn, brake gently, give it space.", {"car"}),
    # No punctuation
    ("car ahead braking slow down now", {"car"}),
    ("red light two cars in front stop behind them", {"traffic light", "car"}),
    ("pedestrian left side of road looking at phone be ready to brake", {"person"}),
    ("heavy rain truck spray ahead drop back and use low beams", {"truck"}),
    ("clear road nothing ahead keep lane and speed", set()),
    # Abbreviations, numbers, dashes, capitals
    ("Veh. ahead = white car, ~25 m, const. speed; OK to follow.", {"car"}),
    ("Ped xing L>R, 15 m, stop; ped = adult w/ dog.", {"person", "dog"}),
    ("TTC 2.1 s to lead car - brake.", {"car"}),
    ("RED LIGHT - stop line 10 m - one car waiting.", {"traffic light", "car"}),
    ("CAUTION bus stopped in lane, pass left only if clear.", {"bus"}),
    ("60 zone, 55 now, truck 3 s ahead, fine.", {"truck"}),
    ("Lane closed - cones - workers on right - merge left behind blue car.", {"person", "car"}),
    ("Stop-and-go traffic, cars three abreast, keep 5 m, no phone.", {"car"}),
    ("Green light -> go, but ped still on crossing -> wait.", {"traffic light", "person"}),
    ("2 cyclists + 1 parked truck, right side; oncoming lane empty; pass slowly.", {"bicycle", "person", "truck"}),
    # One clause
    ("Brake for pedestrian.", {"person"}),
    ("Car reversing out of driveway.", {"car"}),
    ("Follow the truck at a safe distance.", {"truck"}),
    ("Green light, go.", {"traffic light"}),
    ("Yield to oncoming car.", {"car"}),
    ("Empty road, keep going.", set()),
    # Denials
    ("No traffic, no pedestrians, straight road, cruise at 80.", set()),
    ("Light green, no cross traffic, follow the car through.", {"traffic light", "car"}),
    ("Nobody on the crossing, bus behind is close, do not stop.", {"bus"}),
    # Longer ones
    ("Rainy night in the city, two cars ahead at the red light and a delivery van half on the kerb; leave space in "
     "front of the van in case it moves off, and stop well short of the crossing.", {"car", "traffic light"}),
    ("Residential street, speed bumps every 50 m, parked cars on both sides, kid with a ball near the second "
     "driveway on the right, so come down to walking pace, cover the brake, keep a metre from the mirrors, and "
     "expect someone to run out from between the cars at any moment without looking.",
     {"car", "person", "sports ball"}),
    ("Motorway, three lanes, moderate traffic, truck in lane one drifting towards the line, car in lane three "
     "coming up fast from behind: stay in the middle, no lane change for now, and pass the truck quickly rather "
     "than sit beside it.", {"truck", "car"}),
    ("Light goes amber, bus ahead commits, do not follow it through; stop, wait for pedestrians, then look left for "
     "the cyclist who came up along the kerb before moving off.", {"traffic light", "bus", "person", "bicycle"}),
)

SENTENCES = (
    ("The car slows down because the traffic light ahead is red.", {"traffic light"}),
    ("The car is driving forward as traffic flows freely.", set()),
    ("The car is stopped because the light is red.", {"traffic light"}),
    ("The car accelerates because the light turned green.", {"traffic light"}),
    ("The car slows to a stop since the truck in front of it has stopped.", {"truck"}),
    ("The car moves forward slowly because the bus ahead is moving slowly.", {"bus"}),
    ("The car stops because a pedestrian is crossing the street.", {"person"}),
    ("The car waits for the pedestrians to clear the crosswalk.", {"person"}),
    ("The car merges into the left lane to pass a slow truck.", {"truck"}),
    ("The car turns right onto the main street because the road is clear.", set()),
    ("The car maintains a steady speed because the road is clear.", set()),
    ("The car drives at a constant speed since there is no traffic.", set()),
    ("The car comes to a complete stop at the stop sign.", {"stop sign"}),
    ("The car slows down as it approaches a stop sign.", {"stop sign"}),
    ("The car pulls over to the right side of the road to park.", set()),
    ("The car veers to the left to avoid a cyclist on the right.", {"bicycle", "person"}),
    ("The car brakes hard because a dog has run into the road.", {"dog"}),
    ("The car is waiting because a train is passing.", {"train"}),
    ("The car swerves slightly because a motorcycle is passing on its left.", {"motorcycle"}),
    ("The car creeps forward because it wants to see around the parked truck.", {"truck"}),
    ("The car reverses out of the parking space.", set()),
    ("The car makes a left turn after the oncoming truck has passed.", {"truck"}),
    ("The car stops because the car in front of it has stopped.", {"car"}),
    ("The car follows the white car ahead through the intersection.", {"car"}),
    ("The car slows since the cars ahead are braking for a red light.", {"car", "traffic light"}),
    ("The car changes lanes because the car ahead is turning left.", {"car"}),
    ("The car drives past a row of parked cars.", {"car"}),
    ("The car speeds up to merge with the other cars on the highway.", {"car"}),
    ("The vehicle slows because another car cuts in from the right lane.", {"car"}),
    ("The ego car stays behind the bus until it leaves the bus stop.", {"bus"}),
    ("The vehicle is stationary at a red light behind two cars.", {"car", "traffic light"}),
    ("Our car keeps its distance from the truck because the road is wet.", {"truck"}),
    ("The driver slows down because a child is near the curb.", {"person"}),
    ("The car turns left at the green light.", {"traffic light"}),
    ("The car is moving forward because the car in front has started to move.", {"car"}),
    ("The car stops to let a woman with a stroller cross.", {"person"}),
    ("The car gives way to a cyclist who is going straight.", {"bicycle", "person"}),
    ("The car goes around the bus because it has stopped at the bus stop.", {"bus"}),
    ("The car continues straight because the light is green and the crossing is empty.", {"traffic light"}),
    ("The car inches forward in heavy traffic because it is close to the car ahead.", {"car"}),
    ("The car is parked on the side of the street.", set()),
    ("The car enters the highway and then accelerates to the speed of the other traffic.", set()),
    ("The car slows down before a speed bump.", set()),
    ("A car ahead brakes, so the ego vehicle slows down too.", {"car"}),
    ("A man steps onto the road between two parked cars, and we stop for him.", {"person", "car"}),
    ("The truck ahead signals right, then it leaves the highway.", {"truck"}),
    ("People are crossing, so the car has to wait even though the light is green.", {"person", "traffic light"}),
)

REPORTS = (
    ("The camera car drives along a wide street in the afternoon. A white car is ahead of it in the same lane. The "
     "traffic light turns red, so both stop. After some seconds the light becomes green and both continue.",
     {"car", "traffic light"}),
    ("It is night and the road is wet. A bus stands at the right side with its indicator on. The ego vehicle slows "
     "down and lets the bus go out. Then it follows the bus.", {"bus"}),
    ("We drive on a highway with three lanes. There are several trucks in the right lane. We overtake them in the "
     "middle lane and keep the speed.", {"truck"}),
    ("The video begins at a stop sign in a residential area. Two people walk across the road from the right to the "
     "left. When they have reached the sidewalk, the ego vehicle turns left.", {"stop sign", "person"}),
    ("The road goes through fields and there is no other traffic. The sky is grey. After a long curve the ego "
     "vehicle passes a small farm and then stops at a junction.", set()),
    ("A cyclist rides on the right side of the street in front of us. We stay behind him because a car comes from "
     "the other direction. When the car is gone, we pass the cyclist with enough distance.",
     {"bicycle", "person", "car"}),
    ("The ego vehicle waits at a level crossing in the morning. A long train comes from the left and needs about "
     "six seconds to pass. The barrier opens and the ego vehicle goes over the rails.", {"train"}),
    ("The ego vehicle drives slowly in a parking lot. On both sides there are parked cars. One of the cars begins "
     "to reverse, and the ego vehicle stops until it has finished.", {"car"}),
    ("It rains heavily and one can see only about fifty metres. The truck ahead throws up much water. The ego "
     "vehicle increases the distance. Later the rain becomes weaker.", {"truck"}),
    ("In this clip the traffic is dense. The cars move, stop and move again. A motorcycle goes between the two "
     "lanes and overtakes all of them. The ego vehicle does not change its lane.", {"car", "motorcycle"}),
    ("A dog runs from the left side onto the road. The ego vehicle brakes strongly. The dog turns around and goes "
     "back. A woman on the sidewalk calls it. After this the ego vehicle drives on with low speed.", {"dog", "person"}),
    ("The street is narrow and there are trees along it. An old blue car is parked at the right. The ego vehicle "
     "moves a little to the left in order to pass it.", {"car"}),
    ("The ego vehicle comes to a crossroads where the traffic lights do not work. It stops and looks. A truck from "
     "the right goes first, afterwards the ego vehicle crosses.", {"traffic light", "truck"}),
    ("It is a sunny day in the city centre. Many pedestrians are on the sidewalks, but nobody is on the road. A "
     "taxi in front stops suddenly to take in a passenger. The ego vehicle has to stop too. A few seconds later the "
     "taxi drives away. The ego vehicle goes straight on.", {"person", "car"}),
    ("The snow lies on both sides of the road, while the road itself is free of it. A bus comes towards us and "
     "passes. Behind it there are two cars. Nothing else happens.", {"bus", "car"}),
)
